"""Free Spoken Digit Dataset: English digits by six speakers, 8 kHz.

Its own layout is recordings/{digit}_{speaker}_{number}.wav; a zip with a manifest.csv (file, label, speaker) is read,
too. Without data.folds or data.group its official split is used, numbers 0 to 4 held out, which shares all speakers.

Source: github.com/Jakobovski/free-spoken-digit-dataset, CC BY-SA 4.0.
"""

from __future__ import annotations

import re
from pathlib import Path

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, register_dataset
from mambaverse.errors import UserError, warn
from mambaverse.splits import refuse_drawn
from mambaverse.tasks.audio.clips import (
    AudioSplits,
    Collection,
    Source,
    class_names,
    readable,
    skipped_note,
    split_collection,
)
from mambaverse.tasks.audio.config import AudioDataConfig
from mambaverse.tasks.audio.datasets._archive import has_manifest, read_manifest

COLUMNS = ("file", "label", "speaker")
NAME = re.compile(r"(\d)_([^_]+)_(\d+)\.(?:wav|flac)$")
HELD_OUT = 5  # recordings numbered below it


@register_dataset("audio/fsdd")
class FSDD(Dataset):
    """Spoken digits; group: speaker."""

    summary = "spoken English digits: 3,000 clips of 6 speakers, 10 classes"
    needs = "the folder recordings/ with {digit}_{speaker}_{number}.wav, or a zip of such files with a manifest.csv"
    source = "github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0)"

    def find(self, place: Path) -> Path | None:
        """Return the folder of recordings, or the zip: `place` itself, or in it."""
        for folder in (place / "recordings", place):
            if folder.is_dir() and any(NAME.match(path.name) for path in folder.iterdir()):
                return folder
        zips = [place, *sorted(place.glob("fsdd*.zip"))] if place.is_dir() else [place]
        return next((path for path in zips if has_manifest(path, COLUMNS)), None)

    def open(self, config: DataConfig) -> AudioSplits:
        """Return the splits that the config asks for, or the official one."""
        assert isinstance(config, AudioDataConfig)
        found = self.locate(config.root, config.download)
        if found.is_dir():
            paths = [path for path in sorted(found.iterdir()) if NAME.match(path.name)]
            sources, names = [Source(path) for path in paths], [path.name for path in paths]
        else:
            names = [row["file"] for row in read_manifest(found, COLUMNS)]
            sources = [Source(found, name) for name in names]
        parts = [NAME.search(name) for name in names]
        for name, part in zip(names, parts, strict=True):
            if part is None:
                raise UserError(f"{found}: {name!r} is not named {{digit}}_{{speaker}}_{{number}}.wav or .flac")
        digits, speakers, numbers = zip(*(part.groups() for part in parts if part is not None), strict=True)
        collection = Collection(sources, digits, names, {"speaker": speakers})
        if config.folds or config.group:
            return split_collection(collection, config, self.name, config.rate)
        refuse_drawn(config, self.name, "take it out, or split anew with data.folds or data.group")
        warn(f"{self.name}: the official split ignores the group speaker: all are learnt from; data.group=speaker "
             "keeps each on one side")  # fmt: skip
        held_out = {name for name, number in zip(names, numbers, strict=True) if int(number) < HELD_OUT}
        kept, skipped = readable(collection, config.on_error, config.rate)
        rows = [[i for i, name in enumerate(kept.names) if (name in held_out) == wanted] for wanted in (False, True)]
        train, evaluated = map(kept.take, rows)
        note = ", ".join([f"official split: numbers 0 to {HELD_OUT - 1} held out", *skipped_note(skipped)])
        return AudioSplits(train, evaluated, class_names(digits, self.name), note, skipped=skipped, group="speaker")
