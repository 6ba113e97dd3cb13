"""The Nucleotide Transformer's 18 revised downstream tasks; see `_nucleotide_transformer.py`."""

from __future__ import annotations

from mambaverse.datasets import register_dataset
from mambaverse.tasks.dna.datasets._nucleotide_transformer import BOTH, FIRST, REVISED, Downstream


@register_dataset("dna/nucleotide_transformer_revised")
class NucleotideTransformerRevised(Downstream):
    """One of the 18 revised downstream tasks, split as published."""

    summary = "Nucleotide Transformer's 18 revised tasks: human histones, enhancers, promoters, splice sites"
    source = "huggingface.co/datasets/InstaDeepAI/nucleotide_transformer_downstream_tasks_revised"
    tasks = (*REVISED, *BOTH)
    other = "nucleotide_transformer"
    others = (*FIRST, *BOTH)
