"""GUE, the Genome Understanding Evaluation: tasks in folders, each with train.csv, dev.csv and test.csv.

`data.root` is the folder GUE/, or a .zip of it, and `data.subset` a task in it, such as mouse/0 or prom/prom_core_all.
The dev set chooses the weights, the test set is what is reported; the field reports MCC.

Source: Zhou et al. 2024, "DNABERT-2" (arXiv 2306.15006), section 4.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, refuse_unread, register_dataset
from mambaverse.errors import UserError, suggest
from mambaverse.tasks.dna.config import DnaDataConfig
from mambaverse.tasks.dna.files import read_records
from mambaverse.tasks.dna.tables import SETS, DnaSplits, Table, collect, make_splits

FILES = ("train.csv", "dev.csv", "test.csv")


@register_dataset("dna/gue")
class Gue(Dataset):
    """One task of GUE, split as published."""

    summary = "GUE: 28 tasks (promoters, transcription factors, splice sites, ...), 70 to 1,000 bases, official splits"
    needs = "data.root, the folder GUE/ or a .zip of it, and data.subset, a task in it such as mouse/0"
    source = "github.com/MAGICS-LAB/DNABERT_2"

    def places(self, root: str | None) -> list[Path]:
        """Return `root`: there is no other place."""
        return [] if root is None else [Path(root).expanduser()]

    def find(self, place: Path) -> Path | None:
        """Return `place` if it is a folder or a .zip file."""
        return place if place.is_dir() or (place.is_file() and zipfile.is_zipfile(place)) else None

    def open(self, config: DataConfig) -> DnaSplits:
        """Return the official splits of the task `data.subset`."""
        assert isinstance(config, DnaDataConfig)
        refuse_unread(config, self.name, "table of GUE", "label_pattern", "genome")
        place = self.locate(config.root, config.download)
        known = tasks(place)
        if not known:
            raise UserError(f"{place}: holds no folders with {', '.join(FILES)}")
        if config.subset is None and len(known) > 1:
            raise UserError(f"data.subset is not set; the tasks in {place} are {', '.join(known)}")
        subset = config.subset or known[0]
        if subset not in known:
            raise UserError(f"data.subset={subset}: no task in {place}{suggest(subset, known)}")
        label = config.label or "label"
        table = Table()
        for name in FILES:
            path = (zipfile.Path(place) if place.is_file() else place) / subset / name
            keys = {config.sequence: "data.sequence", label: "data.label"}
            records = read_records(path, config.sequence, [label], keys)
            table.extend(collect(records, config, lambda r: r.cells[label], part=SETS[name.removesuffix(".csv")]))
        return make_splits(table, config, f"{place}, {subset}")


def tasks(place: Path) -> list[str]:
    """Return the tasks in a folder or .zip file, sorted: the folders that hold train.csv."""
    if place.is_file():
        with zipfile.ZipFile(place) as archive:
            names = [Path(name) for name in archive.namelist()]
    else:
        names = [path.relative_to(place) for path in place.rglob(FILES[0])]
    return sorted(path.parent.as_posix() for path in names if path.name == FILES[0])
