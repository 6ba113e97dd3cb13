"""Drums: one-shots of five instruments out of 12 drum kits; a kit that was never heard is harder than a new sample.

Classes are read off the instruments' names in each kit's drumkit.xml; a clip is the first second of a sample.

Source: Debian's hydrogen-drumkits, /usr/share/hydrogen/data/drumkits/KIT; GPL 2+, CC BY (SA) 3.0 or CC0, kit by kit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, register_dataset
from mambaverse.errors import UserError
from mambaverse.tasks.audio.clips import AudioSplits, Collection, Source, split_collection
from mambaverse.tasks.audio.config import AudioDataConfig
from mambaverse.tasks.audio.datasets._archive import has_manifest, read_manifest, write_archive

FILE = "drums.zip"
COLUMNS = ("file", "drum", "kit")
SECONDS = 1.0
KINDS = {  # the first that an instrument's name matches
    "hihat": re.compile(r"hat\b|\bhh\b|\bhi-hat", re.IGNORECASE),
    "cymbal": re.compile(r"crash|ride|splash|china|cymbal", re.IGNORECASE),
    "tom": re.compile(r"\btoms?\b", re.IGNORECASE),
    "snare": re.compile(r"snare", re.IGNORECASE),
    "kick": re.compile(r"kick|bass ?drum", re.IGNORECASE),
}


@register_dataset("audio/drums")
class Drums(Dataset):
    """Drum samples; group: kit."""

    summary = "one-shots of kick, snare, tom, hi-hat and cymbal from 12 drum kits, 464 clips, 5 classes"
    needs = f"{FILE}, which `mambaverse data audio/drums` builds"
    source = "Debian's package hydrogen-drumkits (GPL 2+, CC BY and CC BY-SA 3.0, CC0)"
    package = "hydrogen-drumkits (Debian)"
    system_places = (Path("/usr/share/hydrogen"),)

    def find(self, place: Path) -> Path | None:
        """Return the prepared zip: `place` itself, or in it."""
        return next((path for path in (place, place / FILE) if has_manifest(path, COLUMNS)), None)

    def find_package(self, place: Path) -> Path | None:
        """Return the folder of kits of an installed or unpacked hydrogen-drumkits."""
        for folder in (place / "usr/share/hydrogen/data/drumkits", place / "data/drumkits", place):
            if any(folder.glob("*/drumkit.xml")):
                return folder
        return None

    def build(self, raw: Path, folder: Path) -> None:
        """Convert the first second of each sample to 16-kHz 16-bit WAV, in one zip with a manifest."""
        kits = sorted(path.parent for path in raw.glob("*/drumkit.xml"))
        rows = [(row, path) for kit in kits for row, path in _samples(kit)]
        write_archive(folder / FILE, COLUMNS, rows, SECONDS)

    def open(self, config: DataConfig) -> AudioSplits:
        """Return the splits that the config asks for."""
        assert isinstance(config, AudioDataConfig)
        archive = self.locate(config.root, config.download)
        rows = read_manifest(archive, COLUMNS)
        collection = Collection(
            [Source(archive, row["file"]) for row in rows],
            [row["drum"] for row in rows],
            [row["file"] for row in rows],
            {"kit": [row["kit"] for row in rows]},
        )
        return split_collection(collection, config, self.name, config.rate)


def _samples(kit: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Yield (row of the manifest, sample) for each sample of a kit whose instrument is of a known kind, once."""
    try:
        root = ElementTree.parse(kit / "drumkit.xml").getroot()
    except ElementTree.ParseError as error:
        raise UserError(f"{kit / 'drumkit.xml'}: not readable as XML: {error}") from None
    seen: set[Path] = set()
    for instrument in root.iter():
        if not instrument.tag.endswith("instrument"):
            continue
        name = instrument.findtext("{*}name") or ""
        kind = next((kind for kind, pattern in KINDS.items() if pattern.search(name)), None)
        for element in instrument.iter():
            path = kit / (element.text or "").strip()
            if kind and element.tag.endswith("filename") and path.is_file() and path not in seen:
                seen.add(path)
                yield (f"{kit.name}/{kind}_{path.stem}.wav", kind, kit.name), path
