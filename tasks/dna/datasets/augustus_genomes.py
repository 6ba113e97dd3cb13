"""Pieces of two genomes out of a Debian package, 27 million bases: human chr3, 4 and 5 (2 Mb each), fruit-fly chr2R.

Human chr5 is held out whole, half of it to choose the weights and half to be reported; of the fly's chr2R the last
fifth likewise. So nothing is learnt from what `dna/species3` tests on.

Source: the tutorial of AUGUSTUS (Stanke et al.), human hg19 and fly dm3 as UCSC has them; soft-masked.
"""

from __future__ import annotations

from pathlib import Path

from mambaverse.datasets import register_dataset
from mambaverse.tasks.dna.files import read_records
from mambaverse.tasks.dna.pretraining.corpus import BuiltGenome, write_genome

SYSTEM = Path("/usr/share/doc/augustus/tutorial/data")
RECORDS = {
    "human_chr3": "chr3.42M.fa",
    "human_chr4": "chr4.103M.fa",
    "human_chr5": "chr5.124M.fa",
    "fly_chr2R": "chr2R.fa",
}
CUTS = {"human_chr5": (0.0, 0.5), "fly_chr2R": (0.8, 0.9)}  # where training ends, and what chooses the weights


@register_dataset("dna/augustus_genomes")
class AugustusGenomes(BuiltGenome):
    """Human and fruit-fly sequence to pretrain on."""

    summary = (
        "human chr3, 4, 5 (2 Mb each) and fruit-fly chr2R (21 Mb), to pretrain on; chr5 and a fifth of 2R held out"
    )
    source = "the Debian package augustus-doc (Artistic Licence)"
    package = "augustus-doc (Debian)"
    note = "human chr5 and the last fifth of the fly's chr2R are held out"

    def places(self, root: str | None) -> list[Path]:
        """Return `root`, or where the built files and the installed package are."""
        return [*super().places(root), *([] if root is not None else [SYSTEM])]

    def find_package(self, place: Path) -> Path | None:
        """Return the folder with all four files."""
        if not place.is_dir():
            return None
        found = (path.parent for path in place.rglob(RECORDS["fly_chr2R"]))
        return next((folder for folder in found if all((folder / n).is_file() for n in RECORDS.values())), None)

    def build(self, raw: Path, folder: Path) -> None:
        """Write the four records, and what is held out."""
        records = {name: b"".join(r.letters for r in read_records(raw / file)) for name, file in RECORDS.items()}
        rows: dict[str, list[tuple[str, int, int]]] = {"train": [], "valid": [], "test": []}
        for name, letters in records.items():
            first, second = (round(share * len(letters)) for share in CUTS.get(name, (1.0, 1.0)))
            for split, a, b in (("train", 0, first), ("valid", first, second), ("test", second, len(letters))):
                rows[split] += [(name, a, b)] if b > a else []
        write_genome(folder, records, rows)
