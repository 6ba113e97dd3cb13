"""Speech Commands: one-second clips of English words, 16 kHz, with official validation and test lists.

The folder holds WORD/{speaker}_nohash_{number}.wav, validation_list.txt and testing_list.txt (paths, one a line); what
is in neither list is learnt from. Folders that begin with "_" (background noise) are left out.

Source: P. Warden 2018, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition" (arXiv 1804.03209),
version 0.02: 105,829 clips of 35 words, CC BY 4.0.
"""

from __future__ import annotations

from pathlib import Path

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, register_dataset
from mambaverse.errors import UserError
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

LISTS = {"eval": "validation_list.txt", "test": "testing_list.txt"}
URL = "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
MD5 = "6b74f3901214cb2c2934e98196829835"


@register_dataset("audio/speech_commands")
class SpeechCommands(Dataset):
    """Spoken words, the official three sets; group: speaker."""

    summary = "Speech Commands: 105,829 clips of one second, 35 words, official validation and test sets"
    needs = "the folder with WORD/*.wav, validation_list.txt and testing_list.txt"
    source = f"{URL} (CC BY 4.0)"
    fetches = "speech_commands_v0.02.tar.gz (2.3 GB) with torchvision"

    def find(self, place: Path) -> Path | None:
        """Return the folder with both lists: `place`, or one in it."""
        folders = [place, *sorted(path for path in place.iterdir() if path.is_dir())] if place.is_dir() else []
        return next((path for path in folders if all((path / name).is_file() for name in LISTS.values())), None)

    def download(self, folder: Path) -> None:
        """Fetch and unpack the archive."""
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(URL, str(folder), md5=MD5)

    def open(self, config: DataConfig) -> AudioSplits:
        """Return the official sets; with data.folds or data.group a split of all clips instead."""
        assert isinstance(config, AudioDataConfig)
        root = self.locate(config.root, config.download)
        paths = sorted(
            path for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(("_", "."))
            for path in folder.glob("*.wav")
        )  # fmt: skip
        if not paths:
            raise UserError(f"{root}: has the lists, but no WORD/*.wav")
        names = [path.relative_to(root).as_posix() for path in paths]
        speakers = [path.name.partition("_")[0] for path in paths]
        labels = [path.parent.name for path in paths]
        collection = Collection([Source(path) for path in paths], labels, names, {"speaker": speakers})
        if config.folds or config.group:
            return split_collection(collection, config, self.name, config.rate)
        refuse_drawn(config, self.name, "take it out, or split anew with data.folds or data.group")
        listed = {part: self._read_list(root / name, set(names)) for part, name in LISTS.items()}
        collection, skipped = readable(collection, config.on_error, config.rate)
        parts: dict[str, list[int]] = {"train": [], "eval": [], "test": []}
        for row, name in enumerate(collection.names):
            parts[next((part for part, inside in listed.items() if name in inside), "train")].append(row)
        if empty := [name for name, rows in parts.items() if not rows]:
            raise UserError(f"{root}: no clips for the {empty[0]} set; the lists are those of another version")
        train, held_out, test = (collection.take(rows) for rows in parts.values())
        note = ", ".join(["the official sets", *skipped_note(skipped)])
        return AudioSplits(train, held_out, class_names(labels, self.name), note, test, skipped, group="speaker")

    def _read_list(self, path: Path, known: set[str]) -> set[str]:
        """Return the names in a list; all must be there."""
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not readable as a list of files: {error}") from None
        names = {line.strip() for line in text.splitlines() if line.strip()}
        if missing := sorted(names - known):
            raise UserError(f"{path}: names {missing[0]!r} ({len(missing)} such), which is not in {path.parent}")
        return names
