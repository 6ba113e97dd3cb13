"""RIFF/WAVE files: reader of every uncompressed form, block by block, and writer of 16-bit PCM.

    "RIFF" size "WAVE" { id size data }*       "fmt " = code, channels, rate, bytes/s, bytes/frame, bits
    integers of b bits -> [-1, 1):  8 bits are unsigned, (x - 128) / 128;  else x / 2^(b - 1)

Source: Microsoft and IBM, "Multimedia Programming Interface and Data Specifications 1.0" (1991), and
WAVE_FORMAT_EXTENSIBLE. The standard library's `wave` reads neither floats nor, in Python 3.11, extensible headers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # format codes
DTYPES = {(PCM, 8): "u1", (PCM, 16): "<i2", (PCM, 32): "<i4", (FLOAT, 32): "<f4", (FLOAT, 64): "<f8"}
UNKNOWN = 0x7FFF0000  # from here on a size is of a stream whose end was not known: SoX's 0x7FFFF000, FFmpeg's -1
CODECS = {2: "Microsoft ADPCM", 6: "A-law", 7: "µ-law", 17: "IMA ADPCM", 49: "GSM 6.10", 85: "MP3"}


class WavError(ValueError):
    """Bytes that are no WAV file, or one that cannot be used; the message says why, and has no file name."""


class CompressedWavError(WavError):
    """A WAV file of a codec that this reader does not have."""


@dataclass(frozen=True)
class Wav:
    """What a WAV file holds: its values as they lie there (L, channels), and their rate in Hz."""

    values: np.ndarray
    rate: int

    def samples(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the frames [start, stop) as float32 (L, channels), integers scaled to [-1, 1)."""
        block = self.values[start:stop]
        if block.dtype.kind == "f":
            with np.errstate(over="ignore"):  # an infinity, which its reader refuses
                return block.astype(np.float32)
        if block.dtype == np.uint8:
            return (block.astype(np.float32) - 128) / 128
        return block.astype(np.float32) / np.float32(2 ** (8 * block.dtype.itemsize - 1))


def is_wav(data: bytes) -> bool:
    """Whether `data` begins as a WAV file does."""
    return data[:4] == b"RIFF" and data[8:12] == b"WAVE"


def decode_wav(data: bytes) -> Wav:
    """Return what a WAV file in memory holds: PCM of 8, 16, 24 or 32 bits, or floats of 32 or 64.

    A file that was cut short after its header is an error: its label may have been cut off, too.

    Raises:
        CompressedWavError: samples of a codec, such as A-law.
        WavError: anything else that is wrong with it.
    """
    if not is_wav(data):
        raise WavError("not a WAV file")
    code, bits, channels, rate, body = _chunks(data)
    if channels < 1:
        raise WavError(f"its header says {channels} channels")
    if code not in (PCM, FLOAT):
        raise CompressedWavError(f"its samples are {CODECS.get(code, f'of the codec {code}')}")
    width = channels * bits // 8
    if code == PCM and bits == 24:
        whole = np.frombuffer(body, np.uint8, count=len(body) // width * width).reshape(-1, 3)
        wide = np.zeros((len(whole), 4), np.uint8)
        wide[:, 1:] = whole  # the low byte stays 0: x · 2^8 as int32
        values = wide.view("<i4")[:, 0]
    elif (code, bits) in DTYPES:
        values = np.frombuffer(body, DTYPES[code, bits], count=len(body) // width * channels)
    else:
        kind = "floats" if code == FLOAT else "integers"
        raise WavError(f"its samples are {kind} of {bits} bits; expected integers of 8, 16, 24, 32 or floats of 32, 64")
    return Wav(values.reshape(-1, channels), rate)


def encode_wav(samples: np.ndarray, rate: int) -> bytes:
    """Return a mono 16-bit WAV file of float samples (L,) in [-1, 1); what is beyond is clipped."""
    body = (np.asarray(samples, np.float64) * 32768).round().clip(-32768, 32767).astype("<i2").tobytes()
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, PCM, 1, rate, 2 * rate, 2, 16)
    return b"RIFF" + struct.pack("<I", 4 + len(fmt) + 8 + len(body)) + b"WAVE" + fmt + b"data" + _size(body) + body


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write `encode_wav` to `path`."""
    path.write_bytes(encode_wav(samples, rate))


def _size(body: bytes) -> bytes:
    return struct.pack("<I", len(body))


def _chunks(data: bytes) -> tuple[int, int, int, int, memoryview]:
    """Return (format code, bits, channels, rate, bytes of the samples, not copied)."""
    at, head = 12, None
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        start = at + 8
        if kind == b"fmt ":
            if size < 16 or start + size > len(data):
                raise WavError("its header is cut short")
            code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", data, start)
            if code == EXTENSIBLE and size >= 26:
                (code,) = struct.unpack_from("<H", data, start + 24)  # the subformat's GUID begins with the old code
            head = code, bits, channels, rate
        elif kind == b"data":
            if head is None:
                raise WavError("its samples come before their format")
            there = len(data) - start
            if there < size < UNKNOWN:
                raise WavError(f"it is cut short: {size:,} bytes of samples expected, {there:,} there")
            return *head, memoryview(data)[start : start + size]
        at = start + size + size % 2
    raise WavError("it has no samples (no data chunk)" if head else "it has no header (no fmt chunk)")
