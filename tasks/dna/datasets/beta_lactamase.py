"""Beta-lactamase genes: which of the classes A, B, C, D does a resistance gene belong to?

5,664 genes of about 900 bases in 231 families (blaTEM, blaSHV, ...). The set to learn humility on: a k-mer SVM reads
99.8 % right if genes are held out at random, and 72.1 % if families are (`data.group=family`).

Source: NCBI's reference genes (public domain), in the PyPI package amrfior (GPL-3) as an index of BWA: .ann has two
lines a sequence, "gi name description" and "offset length number_of_holes"; .pac holds four bases a byte, the first in
the highest bits, A 0, C 1, G 2, T 3 (Li and Durbin 2009, github.com/lh3/bwa, bntseq.c).
"""

from __future__ import annotations

import csv
import lzma
import re
from pathlib import Path

import numpy as np

from mambaverse.datasets import register_dataset
from mambaverse.errors import UserError
from mambaverse.tasks.dna.datasets._prepared import Prepared

STEM, INDEX = "amr_betalactamase", "sequence_dna_bwadb"
FAMILY = re.compile(r"\b(bla[A-Z][A-Za-z]*)")
CLASS = re.compile(r"\b(?:sub)?class ([ABCD])\d?\b|metallo-beta-lactamase")


@register_dataset("dna/beta_lactamase")
class BetaLactamase(Prepared):
    """The class of beta-lactamase genes, of families never seen."""

    summary = "beta-lactamase genes: 5,664 sequences of about 900 bases, classes A, B, C, D, in 231 families"
    needs = f"{STEM}.csv.xz (sequence, class, family)"
    source = "NCBI's reference genes (public domain) in the PyPI package amrfior (GPL-3)"
    package = "amrfior (PyPI: pip download --no-deps amrfior==0.5.1)"
    files = {"": STEM}  # noqa: RUF012
    labels = ("class",)
    groups = ("family",)

    def find_package(self, place: Path) -> Path | None:
        """Return the .ann file of NCBI's genes."""
        if not place.is_dir():
            return None
        found = sorted(place.rglob(f"ncbi/bwa/{INDEX}.ann"))
        return next((path for path in found if path.with_suffix(".pac").is_file()), None)

    def build(self, raw: Path, folder: Path) -> None:
        """Write the genes whose description names a family and a class."""
        packed = np.frombuffer(raw.with_suffix(".pac").read_bytes(), np.uint8)
        codes = (packed[:, None] >> np.array([6, 4, 2, 0], np.uint8) & 3).reshape(-1)
        letters = np.frombuffer(b"ACGT", np.uint8)[codes].tobytes().decode()
        lines = raw.read_text().splitlines()[1:]
        try:
            places = [tuple(map(int, line.split()[:2])) for line in lines[1::2]]
        except ValueError:
            raise UserError(f"{raw}: not an .ann file of BWA; get the package again") from None
        with lzma.open(folder / f"{STEM}.csv.xz", "wt", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("sequence", "class", "family"))
            for description, (start, size) in zip(lines[::2], places, strict=True):
                family, kind = FAMILY.search(description), CLASS.search(description)
                if family and kind:
                    writer.writerow((letters[start : start + size], kind[1] or "B", family[1]))  # class B has a metal
