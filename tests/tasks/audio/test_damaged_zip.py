"""A zip of clips of which one member, or the manifest, is damaged."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from mambaverse.datasets import get_dataset
from mambaverse.errors import UserError
from mambaverse.tasks.audio.clips import Source
from mambaverse.tasks.audio.config import AudioDataConfig
from mambaverse.tasks.audio.wav import encode_wav
from tests.tasks.audio.conftest import tone


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_of_a_zip_is_named_or_skipped_counted_and_listed(tmp_path: Path, method: int) -> None:
    names = [f"{d}_{s}_{i}.wav" for d in "01" for s in ("ann", "bob") for i in range(6)]
    root = tmp_path / "fsdd_x.zip"
    with zipfile.ZipFile(root, "w", method) as archive:
        archive.writestr("manifest.csv", "file,label,speaker\n" + "".join(f"{n},{n[0]},{n[2:5]}\n" for n in names))
        for name in names:
            archive.writestr(name, encode_wav(tone(300, 0.1), 16_000))
        middle = archive.getinfo(names[5]).header_offset + 100
    damaged = bytearray(root.read_bytes())
    damaged[middle : middle + 40] = bytes(40)
    root.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"fsdd_x.zip/{names[5]}: not readable in its zip: .*; get the zip again"):
        Source(root, names[5]).content()
    with pytest.raises(UserError, match=r"no.wav: not readable in its zip: There is no item"):
        Source(root, "no.wav").content()
    config = AudioDataConfig(name="fsdd", root=str(root), folds=2, group="speaker", on_error="skip")
    splits = get_dataset("fsdd", "audio").open(config)
    assert "1 unusable file skipped" in splits.note
    rows = splits.rows()
    assert len(rows) == 24 and [Path(row.name).name for row in rows if row.set == "skipped"] == [names[5]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.wav", "row 2 of its manifest.csv has not as many cells as its head"),
        ("a.wav,1,a,f,g", "row 2 of its manifest.csv has not as many cells as its head"),
        ("a.wav,,a,f", "row 2 of its manifest.csv has nothing in the column 'tone'"),
        ('a.wav,1,"a,f', "not readable as a zip with a manifest.csv: unexpected end of data"),
    ],
)
def test_rows_of_a_manifest_that_say_too_little_or_too_much_are_named(line: str, message: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(path := tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.wav", encode_wav(tone(300), 16_000))
        archive.writestr("manifest.csv", f"file,tone,zhuyin,speaker\na.wav,1,a,f\n{line}\n")
    with pytest.raises(UserError, match=re.escape(message)):
        get_dataset("mandarin_tones", "audio").open(AudioDataConfig(name="mandarin_tones", root=str(path)))
