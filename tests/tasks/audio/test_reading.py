"""What is read from audio files, and what is said of those that cannot be used."""

import struct
from pathlib import Path

import numpy as np
import pytest

from mambaverse.errors import UserError
from mambaverse.tasks.audio import reading
from mambaverse.tasks.audio.reading import decode_audio, list_audio, read_audio, resample
from mambaverse.tasks.audio.wav import decode_wav, encode_wav, write_wav
from tests.tasks.audio.conftest import raw_wav, tone

RATE = 16_000
RAMP = np.linspace(-0.5, 0.5, 400)


def nothing(line: str) -> None:
    raise AssertionError(f"not expected: {line}")


def encoded(form: str) -> bytes:
    """Return RAMP as a WAV file of a form."""
    if form == "u8":
        return raw_wav((RAMP * 128 + 128).round().astype(np.uint8).tobytes(), bits=8)
    if form == "s24":
        wide = (RAMP * 2**23).round().astype("<i4").view(np.uint8).reshape(-1, 4)
        return raw_wav(wide[:, :3].tobytes(), bits=24)
    code, bits, dtype, scale = {
        "s16": (1, 16, "<i2", 2**15), "s32": (1, 32, "<i4", 2**31), "f32": (3, 32, "<f4", 1), "f64": (3, 64, "<f8", 1),
    }[form]  # fmt: skip
    values = RAMP * scale
    return raw_wav((values if code == 3 else values.round()).astype(dtype).tobytes(), bits=bits, code=code)


@pytest.mark.parametrize(
    ("form", "step"), [("u8", 2**-7), ("s16", 2**-15), ("s24", 2**-23), ("s32", 1e-7), ("f32", 1e-7), ("f64", 1e-7)]
)
def test_every_uncompressed_form_is_read(form: str, step: float) -> None:
    wav = decode_wav(encoded(form))
    samples = wav.samples()
    assert wav.rate == RATE and samples.shape == (400, 1) and samples.dtype == np.float32
    np.testing.assert_allclose(samples[:, 0], RAMP, atol=step / 2 + 1e-7)
    np.testing.assert_array_equal(wav.samples(100, 200), samples[100:200])


@pytest.mark.parametrize("form", ["u8", "s16", "s24", "s32", "f32", "f64"])
def test_it_is_what_libsndfile_reads(form: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="the optional extra audio")
    (tmp_path / "x.wav").write_bytes(encoded(form))
    theirs, rate = soundfile.read(tmp_path / "x.wav", dtype="float32")
    np.testing.assert_allclose(read_audio(tmp_path / "x.wav", rate), theirs, atol=1e-7)


def test_what_is_written_is_read() -> None:
    wav = decode_wav(encode_wav(np.array([-2.0, -1.0, 0.0, 0.25, 2.0]), 8000))
    assert wav.rate == 8000 and wav.samples()[:, 0].tolist() == [-1.0, -1.0, 0.0, 0.25, 32767 / 32768]


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000], ids=["ffmpeg", "sox"])
def test_extensible_headers_other_chunks_and_streams_without_a_size_are_read(size: int) -> None:
    body = np.array([0, 16384, -16384], "<i2").tobytes()
    guid = struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
    fmt = struct.pack("<4sIHHIIHHHHI", b"fmt ", 40, 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 4) + guid
    junk = struct.pack("<4sI", b"LIST", 3) + b"abc\0"  # an odd size is padded
    data = struct.pack("<4sI", b"data", size) + body
    wav = decode_wav(b"RIFF\0\0\0\0WAVE" + junk + fmt + data)
    assert wav.samples()[:, 0].tolist() == [0, 0.5, -0.5]


def test_channels_are_averaged(tmp_path: Path) -> None:
    stereo = np.stack([np.full(800, 8192), np.full(800, -4096)], 1).astype("<i2")
    mono = decode_audio(raw_wav(stereo.tobytes(), channels=2), "x.wav", RATE, report=nothing)
    assert mono.shape == (800,) and np.allclose(mono, (0.25 - 0.125) / 2)


@pytest.mark.parametrize("old", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_keeps_a_tone(old: int) -> None:
    t = np.arange(old) / old
    new = resample(np.sin(2 * np.pi * 440 * t).astype(np.float32), old, RATE)
    assert new.shape == (RATE,) and new.dtype == np.float32
    middle = slice(2000, -2000)  # the ends ring
    np.testing.assert_allclose(new[middle], np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)[middle], atol=3e-3)


@pytest.mark.parametrize("channels", [1, 2])
def test_blocks_make_one_clip(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = (tone(500, 0.2) * 32768).astype("<i2")
    data = raw_wav(values.tobytes(), channels=channels)
    whole = decode_audio(data, "x.wav", RATE)
    monkeypatch.setattr(reading, "BLOCK", 333)
    np.testing.assert_array_equal(decode_audio(data, "x.wav", RATE), whole)
    assert len(whole) == len(values) // channels


def test_resampling_removes_what_would_alias() -> None:
    t = np.arange(44_100) / 44_100
    new = resample(np.sin(2 * np.pi * 15_000 * t).astype(np.float32), 44_100, RATE)
    assert np.abs(new[2000:-2000]).max() < 0.01  # 15 kHz lies above the new Nyquist frequency


SAMPLES = (tone(500) * 32768).astype("<i2").tobytes()
BAD = {
    "empty": (b"", "an empty file (0 bytes); record it again or remove it"),
    "no samples": (raw_wav(b""), "it holds no samples; record it again or remove it"),
    "rate 0": (
        raw_wav(SAMPLES, rate=0),
        "a sample rate of 0 Hz, expected 100 to 768,000; it is damaged",
    ),
    "rate 4 GHz": (raw_wav(SAMPLES, rate=2**32 - 1, bits=16), "its header says a sample rate of 4294967295 Hz"),
    "no channels": (raw_wav(SAMPLES, channels=0), "a damaged WAV file: its header says 0 channels"),
    "12 bits": (
        raw_wav(SAMPLES, bits=12),
        "of 12 bits; expected integers of 8, 16, 24, 32 or floats of 32, 64",
    ),
    "cut short": (raw_wav(SAMPLES, size=10**6), "it is cut short: 1,000,000 bytes of samples expected, 9,600 there"),
    "no format": (b"RIFF\0\0\0\0WAVEdata\4\0\0\0abcd", "its samples come before their format"),
    "short header": (b"RIFF\0\0\0\0WAVEfmt \4\0\0\0abcd", "its header is cut short"),
    "header only": (b"RIFF\0\0\0\0WAVE", "it has no header (no fmt chunk)"),
    "no data": (raw_wav(b"")[:36], "it has no samples (no data chunk)"),
    "NaN": (
        raw_wav(np.array([0.1] * 160 + [np.nan], "<f4").tobytes(), bits=32, code=3),
        "the sample at 0.010 s is nan, expected a number about from -1 to 1; convert it again from its source",
    ),
    "absurd": (
        raw_wav(np.array([0.1] * 160 + [1e25], "<f4").tobytes(), bits=32, code=3),
        "the sample at 0.010 s is 1e+25, expected a number",
    ),
    "more than float32 holds": (
        raw_wav(np.array([0.1] * 160 + [1e300], "<f8").tobytes(), bits=64, code=3),
        "the sample at 0.010 s is inf, expected a number",
    ),
    "text": (b"this is a letter, not a recording", "not an audio file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_used_is_one_line_with_its_name_and_the_remedy(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    (path := tmp_path / "bad.wav").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_audio(path, RATE)
    assert message in str(caught.value) and str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.wav", "no such file or directory"), (tmp_path, "is a directory")):
        with pytest.raises(UserError, match=f"{path}: {reason}"):
            read_audio(path, RATE)


def test_a_file_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_BYTES", 1000)
    write_wav(tmp_path / "long.wav", tone(500), RATE)
    with pytest.raises(UserError, match=r"GiB are too much for one clip; cut it into shorter files"):
        read_audio(tmp_path / "long.wav", RATE)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        (np.zeros(1600), "silent (below -80 dB of full scale)"),
        (np.sign(tone(100)), "clipped (100% of its samples are at the limit); record it at a lower level"),
        (4 * tone(100).clip(-0.1, 0.1), None),  # distorted on purpose, but not at the limit
        (tone(100, 0.01), None),  # 10 ms
        (tone(100), None),
    ],
)
def test_silent_and_clipped_files_are_used_with_a_warning(
    samples: np.ndarray, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wav(tmp_path / "x.wav", samples, RATE)
    assert len(read_audio(tmp_path / "x.wav", RATE)) == len(samples)
    warned = capsys.readouterr().err
    assert warned == (f"warning: {tmp_path / 'x.wav'}: {said}\n" if said else "")


def test_channels_that_cancel_each_other_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opposite = np.stack([tone(100), -tone(100)], axis=1).astype("<f4")
    (tmp_path / "x.wav").write_bytes(raw_wav(opposite.tobytes(), channels=2, bits=32, code=3))
    assert not read_audio(tmp_path / "x.wav", RATE).any()
    assert "silent" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.flac", "x.ogg", "x.mp3", "x.aiff"])
def test_compressed_files_are_read_by_soundfile(name: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="the optional extra audio")
    soundfile.write(tmp_path / name, samples := tone(440, 0.5), RATE)
    read = read_audio(tmp_path / name, RATE)
    if name in ("x.flac", "x.aiff"):
        np.testing.assert_allclose(read, samples, atol=2**-15)
    else:
        assert abs(len(read) - len(samples)) < 3000
        strongest = np.abs(np.fft.rfft(read)).argmax() * RATE / len(read)
        assert strongest == pytest.approx(440, abs=5)


@pytest.mark.parametrize("content", [b"fLaC", b"OggS"], ids=["flac", "ogg"])
def test_a_damaged_compressed_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="the optional extra audio")
    (tmp_path / "bad.flac").write_bytes(content + b"\1\2\3" * 50)
    with pytest.raises(UserError, match=r"bad.flac: not an audio file, or a damaged one: .*; expected one of aif, "):
        read_audio(tmp_path / "bad.flac", RATE)


@pytest.mark.parametrize("name", ["x.flac", "x.ogg", "x.mp3", "x.aiff", "x.au", "x.caf"])
def test_a_compressed_file_that_was_cut_short_is_one_line(name: str, tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="the optional extra audio")
    soundfile.write(path := tmp_path / name, tone(440, 5), RATE)
    assert len(read_audio(path, RATE)) >= 5 * RATE
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(UserError, match=rf"{name}: (it is cut short after [23]\.\d+ s; get it|not an audio file)"):
        read_audio(path, RATE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.flac", b"fLaC", r"x.flac: only WAV can be read without soundfile: pip install 'mambaverse\[audio\]', or"),
        ("x.mp3", b"ID3", r"x.mp3: only WAV can be read without soundfile: pip install 'mambaverse\[audio\]'"),
        ("x.wav", raw_wav(b"\x55" * 80, bits=8, code=6), r"x.wav: its samples are A-law, which needs soundfile: pip"),
        ("x.wav", b"letters", r"x.wav: not an audio file: named as WAV, but it does not begin as one"),
        ("x.wav", b"RIFX", r"x.wav: only WAV can be read without soundfile: pip install 'mambaverse\[audio\]', or"),
        ("x.txt", b"letters", r"x.txt: not an audio file: no WAV file, and its name has none of aif, "),
    ],
)
def test_without_soundfile_the_error_says_how_to_get_it(
    name: str, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "has_soundfile", lambda: False)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_audio(tmp_path / name, RATE)


def test_a_law_is_read_by_soundfile(tmp_path: Path) -> None:
    pytest.importorskip("soundfile", reason="the optional extra audio")
    (tmp_path / "x.wav").write_bytes(raw_wav(bytes(range(256)), bits=8, code=6, rate=8000))
    assert len(read_audio(tmp_path / "x.wav", 8000)) == 256


def test_folders_list_audio_files_that_are_not_hidden(clips: Path) -> None:
    assert [path.name for path in list_audio(clips / "low")] == [f"{'ab'[i % 2]}_{i}.wav" for i in (0, 2, 4, 1, 3, 5)]
    assert len(list_audio(clips)) == 12
