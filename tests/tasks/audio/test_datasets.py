"""The data sets: what is found where, how it is split, what is written down, what is refused."""

from __future__ import annotations

import csv
import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mambaverse.config import compose
from mambaverse.datasets import describe_dataset, get_dataset, list_datasets
from mambaverse.errors import UserError
from mambaverse.tasks.audio.clips import AudioSplits, Source
from mambaverse.tasks.audio.config import AudioDataConfig
from mambaverse.tasks.audio.datasets import mandarin_tones
from mambaverse.tasks.audio.datasets.mandarin_tones import EMBEDDED, _split_name
from mambaverse.tasks.audio.task import AudioTask
from mambaverse.tasks.audio.wav import encode_wav, write_wav
from tests.tasks.audio.conftest import tone

Make = Callable[..., AudioTask]


def opened(name: str, **values: Any) -> AudioSplits:
    return get_dataset(name, "audio").open(AudioDataConfig(name=name, **values))


def fails(name: str, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(name, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(splits: AudioSplits) -> tuple[set[str], set[str]]:
    return set(splits.train.names), set(splits.eval.names)


def test_all_are_listed_with_a_config_each() -> None:
    expected = ["drums", "folder", "fsdd", "mandarin_tones", "speech_commands"]
    assert set(list_datasets("audio/*")) >= {f"audio/{name}" for name in expected}
    for name in expected:
        assert compose(f"audio/{name}").data.name == name
        assert describe_dataset(f"audio/{name}")["summary"]


# Mandarin tones


def test_the_clips_inside_are_one_speakers_with_their_licence_and_source() -> None:
    splits = opened("mandarin_tones", folds=5, group="syllable")
    assert len(splits.train.sources) + len(splits.eval.sources) == 136
    assert splits.classes == ["tone 1", "tone 2", "tone 3", "tone 4"]
    assert "inside mambaverse, of one speaker" in splits.note and "fold 0 of 5 by syllable" in splits.note
    assert not set(splits.train.groups["syllable"]) & set(splits.eval.groups["syllable"])
    assert set(splits.train.groups) == {"syllable"}
    texts = [(EMBEDDED.parent / name).read_text() for name in ("SOURCE", "LICENSE")]
    assert "Chu Lo" in texts[0] and "CC BY 3.0" in texts[0] and "Creative Commons Attribution 3.0" in texts[1]
    assert EMBEDDED.stat().st_size < 3e6
    samples = splits.train.sources[0].read(16_000)
    assert samples.dtype == np.float32 and 0.1 < len(samples) / 16_000 < 0.7
    assert get_dataset("mandarin_tones", "audio").status() == f"found: {EMBEDDED}, a part"


def test_a_random_split_of_syllables_warns(capsys: pytest.CaptureFixture[str]) -> None:
    opened("mandarin_tones")
    assert "a random split ignores the groups syllable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("folder", "syllable", "digit"),
    [("ㄇㄚ", "ㄇㄚ", "1"), ("ㄇㄚ2", "ㄇㄚ", "2"), ("ㄇㄚ4", "ㄇㄚ", "4"), ("ㄇㄚ1", "ㄇㄚ", "0")],
)
def test_a_folder_of_the_package_names_syllable_and_tone(folder: str, syllable: str, digit: str) -> None:
    assert _split_name(folder) == (syllable, digit)


def package(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an unpacked package of 3 syllables, 4 tones and the neutral one, two speakers; WAV under an Ogg's name."""
    for syllable in ("ㄇㄚ", "ㄅㄛ", "ㄌㄧ"):
        for suffix in ("", "2", "3", "4", "1"):
            for speaker in ("3", "5"):
                path = root / f"usr/share/gcin-voice/ogg/{syllable}{suffix}/{speaker}.ogg"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_wav(path, tone(200, rate=22_050), 22_050)
    (root / "usr/share/gcin-voice/ogg/README").write_text("no clip")
    return root


def test_the_whole_package_is_built_without_the_neutral_tone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = package(tmp_path / "deb", monkeypatch)
    splits = opened("mandarin_tones", root=str(root), folds=3, group="syllable")
    assert len(splits.train.sources) + len(splits.eval.sources) == 3 * 4 * 2
    assert "2 speakers" in splits.note and set(splits.train.groups) == {"syllable", "speaker"}
    held_out = opened("mandarin_tones", root=str(root), folds=2, group="speaker")
    assert set(held_out.train.groups["speaker"]) != set(held_out.eval.groups["speaker"])
    assert len(held_out.train.sources[0].read(16_000)) == pytest.approx(0.3 * 16_000, abs=1)
    shutil.rmtree(root)
    assert "found" in describe_dataset("audio/mandarin_tones")["status"]
    assert "2 speakers" in opened("mandarin_tones", group="syllable").note  # from where it was built, without root


def test_a_build_is_the_same_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = get_dataset("mandarin_tones", "audio")
    raw = dataset.find_package(package(tmp_path / "deb", monkeypatch))
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert raw is not None
        dataset.build(raw, tmp_path / name)
        contents.append((tmp_path / name / mandarin_tones.FILE).read_bytes())
    assert contents[0] == contents[1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no clips to write"):
        dataset.build(tmp_path / "empty", tmp_path / "empty")


def test_a_place_without_the_package_says_how_to_get_it(tmp_path: Path) -> None:
    error = fails("mandarin_tones", root=str(tmp_path))
    assert "gcin-voice (Debian)" in error and "data.root=PATH" in error


def test_the_sample_of_the_package_is_read(shared_data: Callable[[str], Path]) -> None:
    pytest.importorskip("soundfile", reason="the optional extra audio")
    splits = opened("mandarin_tones", root=str(shared_data("mandarin_tones.zip")), group="syllable", folds=5)
    assert len(splits.train.sources) + len(splits.eval.sources) == 272
    assert len(splits.eval.sources[0].read(16_000)) > 1000


# Zips with a manifest


def write_zip(path: Path, rows: list[dict[str, str]], files: dict[str, bytes]) -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["file"])
    writer.writeheader()
    writer.writerows(rows)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.csv", text.getvalue())
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_archives_that_cannot_be_used(tmp_path: Path) -> None:
    row = {"file": "a.wav", "tone": "1", "zhuyin": "a", "speaker": "f"}
    missing = write_zip(tmp_path / "a.zip", [row], {})
    assert "manifest.csv names 'a.wav', which is not in it" in fails("mandarin_tones", root=str(missing))
    one = write_zip(tmp_path / "b.zip", [row], {"a.wav": b""})
    assert "only one class, 'tone 1'; expected two or more" in fails("mandarin_tones", root=str(one))
    from mambaverse.tasks.audio.datasets._archive import read_manifest

    for path, columns, message in (
        (one, ["speakr"], "its manifest.csv has no column 'speakr', did you mean 'speaker'"),
        (write_zip(tmp_path / "c.zip", [], {}), [], "its manifest.csv has no rows"),
        (tmp_path / "no.zip", [], "not readable as a zip with a manifest.csv"),
    ):
        with pytest.raises(UserError, match=message):
            read_manifest(path, columns)
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(UserError, match=r"d.zip: has no manifest.csv"):
        read_manifest(tmp_path / "d.zip", [])
    (tmp_path / "e.zip").write_bytes(b"PK but no zip")
    with pytest.raises(UserError, match="not readable as a zip"):
        Source(tmp_path / "e.zip", "x").content()


# Spoken digits


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """FSDD's layout: 3 digits, 3 speakers, numbers 0, 4, 5 and 6."""
    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    for digit in "012":
        for speaker in ("ann", "bob", "cy"):
            for number in (0, 4, 5, 6):
                write_wav(folder / f"{digit}_{speaker}_{number}.wav", tone(200 + 100 * int(digit), 0.1, 8000), 8000)
    return tmp_path / "fsdd"


def test_digits_are_held_out_by_speaker(digits: Path) -> None:
    splits = [opened("fsdd", root=str(digits), rate=8000, folds=3, fold=f, group="speaker") for f in range(3)]
    assert sorted({s for split in splits for s in set(split.eval.groups["speaker"])}) == ["ann", "bob", "cy"]
    for split in splits:
        assert len(set(split.eval.groups["speaker"])) == 1 and len(split.eval.sources) == 12
        assert not names(split)[0] & names(split)[1]


def test_without_folds_digits_have_their_official_split_and_a_warning(
    digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = names(opened("fsdd", root=str(digits)))
    assert "comes split; data.val_fraction=0.3 expects" in fails("fsdd", root=str(digits), val_fraction=0.3)
    assert len(held_out) == 18 and all(name.endswith(("_0.wav", "_4.wav")) for name in held_out)
    assert len(train) == 18 and "the official split ignores the group speaker" in capsys.readouterr().err


def test_digits_in_a_zip_are_read_in_place(tmp_path: Path) -> None:
    rows = [
        {"file": f"{d}_{s}_{i}.wav", "label": d, "speaker": s} for d in "01" for s in ("ann", "bob") for i in range(6)
    ]
    root = write_zip(tmp_path / "fsdd_x.zip", rows, {row["file"]: encode_wav(tone(300, 0.1), 16_000) for row in rows})
    for place in (root, tmp_path):
        assert len(opened("fsdd", root=str(place), folds=2, group="speaker").eval.sources) == 12
    bad = write_zip(tmp_path / "bad.zip", [{**rows[0], "file": "zero.wav"}], {"zero.wav": b""})
    assert "'zero.wav' is not named {digit}_{speaker}_{number}.wav" in fails("fsdd", root=str(bad))


def test_the_shared_digits_are_read(shared_data: Callable[[str], Path]) -> None:
    pytest.importorskip("soundfile", reason="the optional extra audio")
    splits = opened("fsdd", root=str(shared_data("fsdd_360.zip")), folds=6, group="speaker")
    assert (len(splits.train.sources), len(splits.eval.sources), len(splits.classes)) == (300, 60, 10)


# Speech Commands


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """Speech Commands' layout: 2 words, 4 clips each, one of them validated and one tested; background noise."""
    root = tmp_path / "speech"
    for word, hz in (("yes", 300), ("no", 600)):
        (root / word).mkdir(parents=True)
        for i in range(4):
            write_wav(root / word / f"{i}abc_nohash_0.wav", tone(hz, 0.2), 16_000)
    (root / "_background_noise_").mkdir()
    write_wav(root / "_background_noise_/pink.wav", tone(50), 16_000)
    (root / "validation_list.txt").write_text("yes/1abc_nohash_0.wav\nno/1abc_nohash_0.wav\n")
    (root / "testing_list.txt").write_text("yes/2abc_nohash_0.wav\nno/2abc_nohash_0.wav\n")
    return root


def test_commands_have_their_official_sets(commands: Path) -> None:
    splits = opened("speech_commands", root=str(commands.parent))
    assert splits.classes == ["no", "yes"] and splits.test is not None
    assert splits.eval.names == ["no/1abc_nohash_0.wav", "yes/1abc_nohash_0.wav"]
    assert splits.test.names == ["no/2abc_nohash_0.wav", "yes/2abc_nohash_0.wav"]
    assert len(splits.train.names) == 4 and "the official sets" in splits.note
    folds = opened("speech_commands", root=str(commands), folds=4, group="speaker")
    assert folds.test is None and len(folds.eval.sources) == 2


def test_lists_of_another_version_are_refused(commands: Path) -> None:
    (commands / "testing_list.txt").write_text("maybe/1.wav\n")
    assert "testing_list.txt: names 'maybe/1.wav' (1 such), which is not in" in fails(
        "speech_commands", root=str(commands)
    )
    (commands / "testing_list.txt").write_bytes(b"\xff")
    assert "testing_list.txt: not readable as a list of files: 'utf-8'" in fails("speech_commands", root=str(commands))
    (commands / "testing_list.txt").write_text("\n")
    assert "no clips for the test set" in fails("speech_commands", root=str(commands))
    for word in ("yes", "no"):
        shutil.rmtree(commands / word)
    assert "has the lists, but no WORD/*.wav" in fails("speech_commands", root=str(commands))
    assert "data.download=true fetch speech_commands" in fails("speech_commands", root=str(commands / "none"))


def test_commands_are_fetched_where_that_is_allowed(
    tmp_path: Path, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(url: str, folder: str, md5: str) -> None:
        assert url.endswith("speech_commands_v0.02.tar.gz") and len(md5) == 32
        shutil.copytree(commands, Path(folder), dirs_exist_ok=True)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    assert len(opened("speech_commands", root=str(tmp_path / "new"), download=True).train.sources) == 4


# Folders


def test_a_folder_of_classes_is_split(clips: Path) -> None:
    splits = opened("folder", root=str(clips))
    assert splits.classes == ["high", "low"] and len(splits.eval.sources) == 2 and len(splits.train.sources) == 10
    assert "20% of each class held out, seed 0" in splits.note


def test_a_regular_expression_reads_groups_off_file_names(clips: Path) -> None:
    splits = opened("folder", root=str(clips), group=r"/([ab])_", folds=2)
    assert {Path(name).name[0] for name in splits.eval.names} != {Path(name).name[0] for name in splits.train.names}
    rows = splits.rows()
    assert {row.group for row in rows if row.set == "eval"} in ({"a"}, {"b"})
    assert "unknown data.group 'speaker'" in fails("folder", root=str(clips), group="speaker")


@pytest.mark.parametrize(("held_out", "has_test"), [(["val"], False), (["test"], False), (["valid", "test"], True)])
def test_folders_that_come_split_stay_so(clips: Path, tmp_path: Path, held_out: list[str], has_test: bool) -> None:
    root = tmp_path / "split"
    for name in ["train", *held_out]:
        shutil.copytree(clips, root / name)
    splits = opened("folder", root=str(root))
    assert len(splits.train.names) == len(splits.eval.names) == 12 and (splits.test is not None) == has_test
    assert splits.eval.names[0].startswith(f"{held_out[0]}/high/")
    assert "comes split; data.folds=2 expects data that do not: take data.folds out" in fails(
        "folder", root=str(root), folds=2
    )
    shutil.rmtree(root / held_out[0] / "low")
    assert f"class 'low' is in train/ and not in {held_out[0]}/" in fails("folder", root=str(root))
    for name in held_out:
        shutil.rmtree(root / name)
    assert "has train/ but neither val/ nor test/ to evaluate on" in fails("folder", root=str(root))


def test_folders_that_cannot_be_used(tmp_path: Path, clips: Path) -> None:
    assert "data.root is not set" in fails("folder")
    (tmp_path / "empty").mkdir()
    assert "has no class folders; expected one folder of audio files" in fails("folder", root=str(tmp_path / "empty"))
    (tmp_path / "empty/a").mkdir()
    assert "has no audio files (of .aif, " in fails("folder", root=str(tmp_path / "empty"))
    (clips / "silence").mkdir()
    assert "silence: an empty class: no audio files" in fails("folder", root=str(clips))
    shutil.rmtree(clips / "silence")
    shutil.rmtree(clips / "low")
    assert "only one class, 'high'; expected two or more" in fails("folder", root=str(clips))


def test_bad_files_stop_the_run_or_are_skipped_counted_and_listed(
    clips: Path, make_task: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (clips / "low/bad.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"low/bad.wav: an empty file \(0 bytes\); record it again or remove it"):
        make_task("audio/folder", f"data.root={clips}")
    task = make_task("audio/folder", f"data.root={clips}", "data.on_error=skip")
    assert "1 of 13 files skipped, the first: " in capsys.readouterr().err
    assert "1 unusable file skipped" in task.describe()["data"]
    written = task.save_split(tmp_path)
    assert written is not None
    rows = list(csv.DictReader(io.StringIO(written.read_text())))
    assert [row["set"] for row in rows].count("skipped") == 1 and len(rows) == 13
    assert all(len(row["sha256"]) == 64 for row in rows)


def test_silent_and_clipped_clips_are_one_warning_a_kind(
    clips: Path, make_task: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        write_wav(clips / f"low/none: {i}.wav", np.zeros(1600), 16_000)
    write_wav(clips / "high/loud.wav", np.sign(tone(100)), 16_000)
    make_task("audio/folder", f"data.root={clips}")
    lines = [line for line in capsys.readouterr().err.splitlines() if " clip" in line]
    kinds = [line.partition("folder: ")[2].partition(": ")[0] for line in lines]
    assert sorted(kinds) == ["1 clip clipped", "4 clips silent"], lines


# Drums

KIT = """<?xml version="1.0"?><drumkit_info xmlns="http://www.hydrogen-music.org/drumkit"><name>Kit</name><instrumentList>
<instrument><name>Kick (22")</name><layer><filename>k1.wav</filename></layer><layer><filename>k2.wav</filename></layer>
</instrument><instrument><name>Closed HH</name><layer><filename>h.wav</filename></layer></instrument>
<instrument><name>Open Hi-Hat</name><filename>h.wav</filename></instrument>
<instrument><name>Ride Jazz</name><filename>r.wav</filename></instrument>
<instrument><name>Pearl Tom Floor</name><filename>t.wav</filename></instrument>
<instrument><name>Snare Rimshot</name><filename>s.wav</filename><filename>missing.wav</filename></instrument>
<instrument><name>Hand Clap</name><filename>c.wav</filename></instrument></instrumentList></drumkit_info>"""


def test_drums_are_built_from_their_kits_and_held_out_by_kit(tmp_path: Path) -> None:
    for kit in ("A", "B"):
        folder = tmp_path / "deb/usr/share/hydrogen/data/drumkits" / kit
        folder.mkdir(parents=True)
        (folder / "drumkit.xml").write_text(KIT)
        for name in ("k1", "k2", "h", "r", "t", "s", "c"):
            write_wav(folder / f"{name}.wav", tone(200, 1.5, 8000), 8000)
    splits = opened("drums", root=str(tmp_path / "deb"), folds=2, group="kit")
    assert splits.classes == ["cymbal", "hihat", "kick", "snare", "tom"]
    assert len(splits.train.sources) == len(splits.eval.sources) == 6
    assert set(splits.train.groups["kit"]) != set(splits.eval.groups["kit"])
    assert len(splits.train.sources[0].read(16_000)) == 16_000  # the first second
    (tmp_path / "deb/usr/share/hydrogen/data/drumkits/B/drumkit.xml").write_text("<drumkit_info>")
    dataset = get_dataset("drums", "audio")
    raw = dataset.find_package(tmp_path / "deb")
    assert raw is not None and dataset.find_package(tmp_path / "nothing") is None
    with pytest.raises(UserError, match=r"drumkit.xml: not readable as XML"):
        dataset.build(raw, tmp_path)
    assert "hydrogen-drumkits (Debian)" in fails("drums", root=str(tmp_path / "nothing"))
