"""Any audio file as one mono waveform at the rate a model wants, or one line that says what is wrong with it.

WAV is read here; FLAC, Ogg, MP3 and what else libsndfile knows by soundfile, the optional extra `audio`.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mambaverse.datasets import files_below
from mambaverse.errors import UserError, warn
from mambaverse.tasks.audio.wav import UNKNOWN, CompressedWavError, WavError, decode_wav, is_wav

WAV_EXTENSIONS = {".wav", ".wave"}
EXTENSIONS = WAV_EXTENSIONS | {".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus"}
INSTALL = "pip install 'mambaverse[audio]'"
RATES = (100, 768_000)  # Hz; outside of it a header is damaged
MAX_BYTES = 2**31  # of one file: it is decoded in memory, at 4 bytes a sample
LOUDEST = 2.0**31  # of a sample: floats that were integers and never scaled pass
FULL_SCALE, CLIPPED_SHARE = 0.999, 0.01  # so large a share of samples so near the limit are a clipped recording
BLOCK = 2**20  # frames that are decoded at once
COMPRESSED = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"FORM", b".snd", b"caff", b"RIFX", b"RF64")  # first bytes
SLACK = 2304  # frames that a compressed file may lack: two of MP3, whose encoders count differently
SIZES = re.compile(r"(\d+) \(should be (\d+)\)")  # of chunks in libsndfile's log: by the header, by the file
SILENCE = 1e-4  # -80 dB of full scale: what dither and a sound card's noise leave of nothing


@dataclass(frozen=True)
class Waveform:
    """Mono samples (L,) float32 at `rate` Hz, and what is odd about them, in words ("silent", ...)."""

    samples: np.ndarray
    rate: int
    oddities: tuple[str, ...] = ()


def read_audio(path: Path, rate: int, *, report: Callable[[str], None] = warn) -> np.ndarray:
    """Return the audio file `path` as mono samples (L,) float32 at `rate` Hz.

    Args:
        path: A file.
        rate: In Hz; a file of another rate is resampled.
        report: Called with a line on a file that can be used but is silent or clipped.

    Raises:
        UserError: missing, too large, or anything of `decode_audio`; the message names the file.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size / 2**30:.1f} GiB are too much for one clip; cut it into shorter files")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    return decode_audio(data, str(path), rate, report=report)


def decode_audio(data: bytes, name: str, rate: int, *, report: Callable[[str], None] = warn) -> np.ndarray:
    """Return an audio file in memory as mono samples (L,) float32 at `rate` Hz; `name` is for messages.

    Channels are averaged. A file that is silent or clipped is reported and used.

    Raises:
        UserError: empty, damaged, not audio, a codec without its library, no plausible rate, or samples that are not
            finite; the message names the file and the remedy.
    """
    wave = decode_waveform(data, name)
    if wave.oddities:
        report(f"{name}: {' and '.join(wave.oddities)}")
    return resample(wave.samples, wave.rate, rate)


def decode_waveform(data: bytes, name: str) -> Waveform:
    """Decode an audio file in memory at its own rate, mono; raises as `decode_audio`.

    It goes block by block: of a long file no second copy with all channels is made.
    """
    if not data:
        raise UserError(f"{name}: an empty file (0 bytes); record it again or remove it")
    rate, blocks = _decode(data, name)
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(
            f"{name}: its header says a sample rate of {rate} Hz, expected {RATES[0]} to {RATES[1]:,}; "
            "it is damaged: convert it again from its source"
        )
    parts: list[np.ndarray] = []
    level, loudest, at_limit, frames, values = 0.0, 0.0, 0, 0, 0
    for block in blocks:
        size = np.abs(block)
        usable = size <= LOUDEST  # a NaN is not
        if not usable.all():
            bad = int((~usable).any(axis=1).argmax())
            raise UserError(
                f"{name}: the sample at {(frames + bad) / rate:.3f} s is {block[bad][~usable[bad]][0]:g}, expected a "
                "number about from -1 to 1; convert it again from its source"
            )
        mono = block.mean(axis=1, dtype=np.float32)
        level = max(level, float(np.abs(mono).max(initial=0)))  # channels may cancel each other
        loudest, at_limit = max(loudest, float(size.max(initial=0))), at_limit + int((size >= FULL_SCALE).sum())
        frames, values = frames + len(block), values + block.size
        parts.append(mono)
    if not frames:
        raise UserError(f"{name}: it holds no samples; record it again or remove it")
    return Waveform(np.concatenate(parts), rate, tuple(_oddities(level, loudest, at_limit / values)))


def resample(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    """Return samples (L,) at `old` Hz as (ceil(L · new / old),) at `new` Hz, band-limited (Kaiser window, β = 5)."""
    if old == new:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(old, new)
    return resample_poly(samples, new // common, old // common).astype(np.float32)


def has_soundfile() -> bool:
    """Whether the optional library is installed."""
    return importlib.util.find_spec("soundfile") is not None


def list_audio(folder: Path) -> list[Path]:
    """Return the audio files that `files_below` finds."""
    return [path for path in files_below(folder) if path.suffix.lower() in EXTENSIONS]


def _decode(data: bytes, name: str) -> tuple[int, Iterator[np.ndarray]]:
    """Return the rate, and blocks of samples (L, channels) float32."""
    if is_wav(data):
        try:
            wav = decode_wav(data)
            return wav.rate, (wav.samples(i, i + BLOCK) for i in range(0, len(wav.values), BLOCK))
        except CompressedWavError as error:
            if not has_soundfile():
                raise UserError(f"{name}: {error}, which needs soundfile: {INSTALL}") from None
        except WavError as error:
            raise UserError(f"{name}: a damaged WAV file: {error}; convert it again from its source") from None
    if not has_soundfile():
        if Path(name).suffix.lower() in WAV_EXTENSIONS and not data.startswith(COMPRESSED):
            raise UserError(f"{name}: not an audio file: named as WAV, but it does not begin as one")
        if not _looks_compressed(data, name):
            raise UserError(f"{name}: not an audio file: no WAV file, and its name has none of {_known()}")
        raise UserError(f"{name}: only WAV can be read without soundfile: {INSTALL}, or convert it to WAV")
    import soundfile

    try:
        file = soundfile.SoundFile(BytesIO(data))
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise UserError(_damaged(name, error)) from None
    return int(file.samplerate), _blocks(file, name)


def _blocks(file: Any, name: str) -> Iterator[np.ndarray]:
    """Yield blocks of samples (L, channels) float32 of an open `soundfile.SoundFile`, and close it."""
    there = 0
    with file:
        while True:
            try:
                block = file.read(BLOCK, dtype="float32", always_2d=True)
            except RuntimeError as error:
                raise UserError(_damaged(name, error)) from None
            if not len(block):
                break
            there += len(block)
            yield block
        if there + SLACK < file.frames or _ends_early(file.extra_info):
            raise UserError(f"{name}: it is cut short after {there / file.samplerate:.3f} s; get it again")


def _ends_early(log: str) -> bool:
    """Whether libsndfile's log of a file says that it ends before its header's sizes do, or within a page of Ogg.

    The last byte may be missing, which only fills a chunk up, and an Ogg stream may end without saying so.
    """
    sizes = ((int(said), int(found)) for said, found in SIZES.findall(log))
    cut = any(found + 1 < said < UNKNOWN for said, found in sizes)
    return cut or ("lacks an end-of-stream bit" in log and "Junk after the last page" in log)


def _damaged(name: str, error: Exception) -> str:
    reason = " ".join(str(getattr(error, "error_string", error)).split()).rstrip(".")
    return f"{name}: not an audio file, or a damaged one: {reason}; expected one of {_known()}"


def _looks_compressed(data: bytes, name: str) -> bool:
    return data.startswith(COMPRESSED) or Path(name).suffix.lower() in EXTENSIONS - WAV_EXTENSIONS


def _oddities(level: float, loudest: float, at_limit: float) -> list[str]:
    """Return what is odd about a clip.

    Args:
        level: Its largest sample, all channels averaged.
        loudest: That of any channel.
        at_limit: The share of samples at full scale.
    """
    if level < SILENCE:
        return ["silent (below -80 dB of full scale)"]
    if at_limit >= CLIPPED_SHARE and loudest <= 1:  # floats beyond full scale are loud, not clipped
        return [f"clipped ({at_limit:.0%} of its samples are at the limit); record it at a lower level"]
    return []


def _known() -> str:
    return ", ".join(sorted(extension[1:] for extension in EXTENSIONS))
