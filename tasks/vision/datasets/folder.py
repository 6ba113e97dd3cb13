"""Any folder of images: root/train/CLASS/... beside root/val (or test), or one root/CLASS/... that is split here.

Labels are numbered by the sorted names of the class folders; files by their sorted paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mambaverse.config import DataConfig, SplitConfig
from mambaverse.datasets import Dataset, register_dataset
from mambaverse.errors import UserError, warn
from mambaverse.splits import refuse_drawn, split_items
from mambaverse.tasks.vision.config import VisionDataConfig
from mambaverse.tasks.vision.images import EXTENSIONS, FileImages, ImageSplits, list_images, read_image, unreadable

EVAL_FOLDERS = ("val", "valid", "validation", "test")  # the first that exists


@register_dataset("vision/folder")
class Folder(Dataset):
    """Image files in one folder a class."""

    summary = "your own images, one folder a class"
    needs = "data.root, a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or with CLASS/*.jpg (then it is split)"

    def places(self, root: str | None) -> list[Path]:
        """Return `root`: there is no other place."""
        return [] if root is None else [Path(root).expanduser()]

    def find(self, place: Path) -> Path | None:
        """Return `place` if it is a folder."""
        return place if place.is_dir() else None

    def open(self, config: DataConfig) -> ImageSplits:
        """Return the splits of the folder, or those of its train/ and val/."""
        assert isinstance(config, VisionDataConfig)
        root = self.locate(config.root)
        notes, skipped = [], []
        if in_pairs := is_split(root):
            refuse_drawn(config, str(root))
        train, held_out = _two_folders(root) if in_pairs else (list_classes(root), {})
        if config.on_error == "skip":
            skipped = unreadable([path for part in (train, held_out) for paths in part.values() for path in paths])
            train, held_out = (_without(part, set(skipped)) for part in (train, held_out))
            notes.append(f"{len(skipped)} unreadable file{'s' * (len(skipped) != 1)} skipped")
            _warn_of(skipped, root)
        if not in_pairs:
            train, held_out, note = split(train, config, root)
            notes.append(note)
        in_chans = config.in_chans or 3
        return ImageSplits(
            _images(train, in_chans),
            _images(held_out, in_chans),
            classes=list(train),
            size=None,
            in_chans=in_chans,
            note=", ".join(notes),
            skipped=skipped,
        )


def is_split(root: Path) -> bool:
    """Whether `root` holds train/ with class folders, or train/ beside val/; a class may be called train, too."""
    train = root / "train"
    return train.is_dir() and (
        any((root / name).is_dir() for name in EVAL_FOLDERS) or any(path.is_dir() for path in train.iterdir())
    )


def list_classes(root: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder of `root`, both sorted by name.

    Raises:
        UserError: no class folders, only one, or one without images; the message names the folder.
    """
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"{root}: has no class folders; expected one folder of images for each class")
    found = {folder.name: list_images(folder) for folder in folders}
    if not any(found.values()):
        raise UserError(f"{root}: has no images (of {', '.join(sorted(EXTENSIONS))}) in its {len(found)} folders")
    if empty := [name for name, paths in found.items() if not paths]:
        raise UserError(
            f"{root / empty[0]}: an empty class: no images (of {', '.join(sorted(EXTENSIONS))}); put some there, or "
            "remove the folder"
        )
    if len(found) == 1:
        raise UserError(f"{root}: only one class, {folders[0].name!r}; expected two or more class folders")
    return found


def split(
    files: Mapping[str, Sequence[Path]], config: SplitConfig, root: Path
) -> tuple[dict[str, list[Path]], dict[str, list[Path]], str]:
    """Hold out some files of each class as `config` says; returns what is learnt from, what is held out, and a note."""
    for name, paths in files.items():
        if len(paths) < 2:
            raise UserError(f"{root / name}: {len(paths)} readable image; a class that is split needs two or more")
    rows = [(name, path) for name, paths in files.items() for path in paths]
    names = [path.relative_to(root).as_posix() for _, path in rows]
    drawn = split_items([name for name, _ in rows], config, str(root), names=names)
    parts: list[dict[str, list[Path]]] = []
    for chosen in (drawn.train, drawn.eval):
        part: dict[str, list[Path]] = {name: [] for name in files}
        for row in chosen:
            part[rows[row][0]].append(rows[row][1])
        parts.append(part)
    return parts[0], parts[1], drawn.note


def _two_folders(root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    names = [name for name in EVAL_FOLDERS if (root / name).is_dir()]
    if not names:
        raise UserError(
            f"{root}: has train/ but none of {', '.join(f'{name}/' for name in EVAL_FOLDERS)} to evaluate on"
        )
    train, held_out = list_classes(root / "train"), list_classes(root / names[0])
    if difference := sorted(set(train) ^ set(held_out)):
        here, there = ("train", names[0]) if difference[0] in train else (names[0], "train")
        raise UserError(f"{root}: class {difference[0]!r} is in {here}/ and not in {there}/")
    return train, held_out


def _warn_of(skipped: Sequence[Path], root: Path) -> None:
    if skipped:
        reason = ""
        try:
            read_image(skipped[0], 3)
        except UserError as error:
            reason = f", the first: {error}"
        warn(f"{root}: {len(skipped)} file{'s' * (len(skipped) != 1)} skipped{reason}; split.csv lists them")


def _without(files: Mapping[str, Sequence[Path]], bad: set[Path]) -> dict[str, list[Path]]:
    kept = {name: [path for path in paths if path not in bad] for name, paths in files.items()}
    if empty := [name for name, paths in kept.items() if not paths]:
        raise UserError(
            f"{files[empty[0]][0].parent}: an empty class: none of its images can be read; remove the folder"
        )
    return kept


def _images(files: Mapping[str, Sequence[Path]], in_chans: int) -> FileImages:
    labels = [label for label, paths in enumerate(files.values()) for _ in paths]
    return FileImages([path for paths in files.values() for path in paths], torch.tensor(labels), in_chans)
