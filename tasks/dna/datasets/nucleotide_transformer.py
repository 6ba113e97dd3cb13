"""The Nucleotide Transformer's first 18 downstream tasks; see `_nucleotide_transformer.py`."""

from __future__ import annotations

from mambaverse.datasets import register_dataset
from mambaverse.tasks.dna.datasets._nucleotide_transformer import BOTH, FIRST, REVISED, Downstream


@register_dataset("dna/nucleotide_transformer")
class NucleotideTransformer(Downstream):
    """One of the first 18 downstream tasks, split as published."""

    summary = "Nucleotide Transformer's first 18 downstream tasks: yeast histones, enhancers, promoters, splice sites"
    source = "huggingface.co/datasets/InstaDeepAI/nucleotide_transformer_downstream_tasks"
    tasks = (*FIRST, *BOTH)
    other = "nucleotide_transformer_revised"
    others = (*REVISED, *BOTH)
