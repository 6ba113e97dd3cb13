"""Any folder of audio: root/train/CLASS/... beside root/val (and test), or root/CLASS/... to be split.

Labels are the names of the class folders; clips are sorted by path. With val/ and test/, test/ is reported.
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
from mambaverse.tasks.audio.reading import EXTENSIONS, list_audio

VALIDATION, TEST = ("val", "valid", "validation", "dev", "eval"), ("test",)


@register_dataset("audio/folder")
class Folder(Dataset):
    """Audio files in one folder a class."""

    summary = "your own audio files, one folder a class"
    needs = "data.root, a folder with CLASS/*.wav (then it is split), or with train/CLASS/*.wav and val/ or test/"

    def places(self, root: str | None) -> list[Path]:
        """Return `root`: there is no other place."""
        return [] if root is None else [Path(root).expanduser()]

    def find(self, place: Path) -> Path | None:
        """Return `place` if it is a folder."""
        return place if place.is_dir() else None

    def open(self, config: DataConfig) -> AudioSplits:
        """Return the splits of the folder, or those of its train/, val/ and test/."""
        assert isinstance(config, AudioDataConfig)
        root = self.locate(config.root)
        if not _is_split(root):
            return split_collection(list_classes(root, root), config, str(root), config.rate)
        refuse_drawn(config, str(root))
        held_out = [name for names in (VALIDATION, TEST) if (name := _first(root, names)) is not None]
        if not held_out:
            raise UserError(f"{root}: has train/ but neither val/ nor test/ to evaluate on")
        folders = ["train", *held_out]
        tried = [readable(list_classes(root / name, root), config.on_error, config.rate) for name in folders]
        parts, skipped = [part for part, _ in tried], [source for _, bad in tried for source in bad]
        classes = class_names(parts[0].labels, str(root / "train"))
        for name, part in zip(folders, parts, strict=True):
            if difference := sorted(set(part.labels) ^ set(classes)):
                here, there = ("train", name) if difference[0] in classes else (name, "train")
                raise UserError(f"{root}: class {difference[0]!r} is in {here}/ and not in {there}/")
        note = ", ".join([" + ".join(f"{name}/" for name in folders), *skipped_note(skipped)])
        return AudioSplits(parts[0], parts[1], classes, note, parts[2] if len(parts) > 2 else None, skipped)


def list_classes(folder: Path, root: Path) -> Collection:
    """Return the audio files of each class folder of `folder`, named relative to `root`.

    Raises:
        UserError: no class folders, or one without audio files; the message names it.
    """
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    expected = f"audio files (of {', '.join(sorted(EXTENSIONS))})"
    if not folders:
        raise UserError(f"{folder}: has no class folders; expected one folder of {expected} for each class")
    found = {path.name: list_audio(path) for path in folders}
    if not any(found.values()):
        raise UserError(f"{folder}: has no {expected} in its {len(found)} folders")
    if empty := [name for name, paths in found.items() if not paths]:
        raise UserError(f"{folder / empty[0]}: an empty class: no {expected}")
    rows = [(Source(path), name, path.relative_to(root).as_posix()) for name, paths in found.items() for path in paths]
    sources, labels, names = map(list, zip(*rows, strict=True))
    return Collection(sources, labels, names)


def _first(root: Path, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if (root / name).is_dir()), None)


def _is_split(root: Path) -> bool:
    """Whether `root` holds train/ beside val/ or test/, or with class folders in it; a class may be called train."""
    train = root / "train"
    return train.is_dir() and (
        _first(root, VALIDATION + TEST) is not None or any(path.is_dir() for path in train.iterdir())
    )
