"""Mandarin tones: one spoken syllable a clip, in one of the four tones, by two speakers.

The package holds clips of a woman (CC BY 3.0: Chu Lo, ChionMeilin) and of a man ((L)GPL 3: Edward Liu), 1147 and 1187
of them, without those in the neutral tone; 136 of the woman's are inside mambaverse.

Source: Debian's gcin-voice, /usr/share/gcin-voice/ogg/ZHUYIN[TONE]/{3,5}.ogg: no digit is tone 1, and "1" is neutral.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mambaverse.config import DataConfig
from mambaverse.datasets import Dataset, MissingDataError, register_dataset
from mambaverse.tasks.audio.clips import AudioSplits, Collection, Source, split_collection
from mambaverse.tasks.audio.config import AudioDataConfig
from mambaverse.tasks.audio.datasets._archive import has_manifest, read_manifest, write_archive

EMBEDDED = Path(__file__).parents[1] / "embedded" / "mandarin_tones.zip"
FILE = "mandarin_tones.zip"
COLUMNS = ("file", "tone", "zhuyin", "speaker")
SPEAKERS = {"3": "m", "5": "f"}  # by the names of the files
NEUTRAL = "1"


@register_dataset("audio/mandarin_tones")
class MandarinTones(Dataset):
    """Syllables in four tones; groups: syllable, speaker."""

    summary = "spoken Mandarin syllables in 4 tones: 136 clips of one speaker inside, 2,334 of two in the whole package"
    needs = f"{FILE}, which `mambaverse data audio/mandarin_tones` builds"
    source = "Debian's package gcin-voice (CC BY 3.0 and (L)GPL 3)"
    package = "gcin-voice (Debian)"
    system_places = (Path("/usr/share/gcin-voice"),)

    def find(self, place: Path) -> Path | None:
        """Return the prepared zip: `place` itself, or in it."""
        return next((path for path in (place, place / FILE) if has_manifest(path, COLUMNS)), None)

    def find_package(self, place: Path) -> Path | None:
        """Return the folder of Ogg files of an installed or unpacked gcin-voice."""
        for folder in (place / "usr/share/gcin-voice/ogg", place / "gcin-voice/ogg", place / "ogg", place):
            if any(folder.glob("*/[35].ogg")):
                return folder
        return None

    def build(self, raw: Path, folder: Path) -> None:
        """Convert all clips but those in the neutral tone to 16-kHz 16-bit WAV, in one zip with a manifest."""
        found = sorted(path for path in raw.glob("*/*.ogg") if path.stem in SPEAKERS)
        rows = [(*_split_name(path.parent.name), SPEAKERS[path.stem], path) for path in found]
        write_archive(folder / FILE, COLUMNS, named(row for row in rows if row[1] != "0"))

    def status(self, root: str | None = None) -> str:
        """Say where the clips are read from: without the package and without a root, from inside mambaverse."""
        said = super().status(root)
        return f"found: {EMBEDDED}, a part" if said == "missing" and root is None else said

    def open(self, config: DataConfig) -> AudioSplits:
        """Return the splits that the config asks for."""
        assert isinstance(config, AudioDataConfig)
        archive = self._place(config.root, config.download)
        rows = read_manifest(archive, COLUMNS)
        collection = Collection(
            [Source(archive, row["file"]) for row in rows],
            [f"tone {row['tone']}" for row in rows],
            [row["file"] for row in rows],
            {"syllable": [row["zhuyin"] for row in rows], "speaker": [row["speaker"] for row in rows]},
        )
        speakers = len(set(collection.groups["speaker"]))
        if speakers == 1:  # then there is nothing to keep on one side
            collection = Collection(*_parts(collection), {"syllable": collection.groups["syllable"]})
        note = "one speaker"
        if archive == EMBEDDED:
            note = "the clips inside mambaverse, of one speaker; all with `mambaverse data audio/mandarin_tones`"
        return split_collection(
            collection, config, self.name, config.rate, note if speakers == 1 else f"{speakers} speakers"
        )

    def _place(self, root: str | None, download: bool) -> Path:
        """Return the zip: at `root`, built from the package, or the one inside mambaverse."""
        try:
            return self.locate(root, download)
        except MissingDataError:
            if root is not None:
                raise
            return EMBEDDED


def named(rows: Iterable[tuple[str, str, str, Path]]) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Yield (row of the manifest, file) for each (zhuyin, tone, speaker, file): syllables get numbers in the zip."""
    numbers: dict[str, int] = {}
    for zhuyin, tone, speaker, path in rows:
        number = numbers.setdefault(zhuyin, len(numbers))
        yield (f"{speaker}/{number:03d}_{tone}.wav", tone, zhuyin, speaker), path


def _split_name(name: str) -> tuple[str, str]:
    """Return (syllable in zhuyin, tone) of a folder's name: tone "1".."4", "0" for the neutral one."""
    digit = name[-1]
    if not digit.isdigit():
        return name, "1"
    return name[:-1], "0" if digit == NEUTRAL else digit


def _parts(collection: Collection) -> tuple[list[Source], list[str], list[str]]:
    return list(collection.sources), list(collection.labels), list(collection.names)
