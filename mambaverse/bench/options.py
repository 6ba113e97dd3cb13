"""What the command line gives to `mambaverse bench`, as strings: read, or refused in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from mambaverse.errors import UserError, suggest

DEVICES = ("cpu", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_applies(where: str, given: Mapping[str, Any], applies: bool, to: str) -> None:
    """Raise UserError for an option that was given to what does not take it."""
    for option, value in given.items():
        if value and not applies:
            value = " ".join(value) if not isinstance(value, str) else value
            raise UserError(f"{where} takes no {option.removeprefix('a ')} ({value!r} was given): that is for {to}")


def parse_device(device: str | None) -> torch.device:
    """Return the device called `device`; None: a GPU where there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in DEVICES:
        raise UserError(f"--device: unknown device {device!r}{suggest(device, DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; without the option, bench runs on the CPU")
    return torch.device(device)


def parse_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype called `dtype`; None: bfloat16 on a GPU, else float32."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UserError(f"--dtype: unknown dtype {dtype!r}{suggest(dtype, DTYPES)}")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name that `parse_dtype` reads."""
    return next(name for name, value in DTYPES.items() if value is dtype)


def positive(option: str, value: int | str) -> int:
    """Return `value` as a whole number from 1; "64k" is 65536."""
    text = str(value).strip().lower()
    number = int(text.removesuffix("k")) if re.fullmatch(r"\d+k?", text) else 0
    if number < 1:
        raise UserError(f"{option}: expected a whole number from 1, got {value!r}")
    return number * (1024 if text.endswith("k") else 1)


def parse_sizes(sizes: str | None) -> list[tuple[int, int, int]] | None:
    """Return (B, L, D) of each size in "8x2048x1024,2x256x192"."""
    if sizes is None:
        return None
    found = []
    for size in sizes.split(","):
        parts = size.lower().split("x")
        if len(parts) != 3:
            raise UserError(f"--sizes: expected batch x length x width, such as 8x2048x1024, got {size!r}")
        batch, length, dim = (positive(f"--sizes {size}", part) for part in parts)
        found.append((batch, length, dim))
    return found


def parse_lengths(lengths: str | None) -> list[int] | None:
    """Return the lengths in "512,1024,64k", sorted, each once."""
    return None if lengths is None else sorted({positive("--lengths", part) for part in lengths.split(",")})
