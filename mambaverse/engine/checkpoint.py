"""Weights files: safetensors, or what `torch.load(weights_only=True)` accepts; a file can never run code.

`argparse.Namespace` is allowed too, since the checkpoints of Vim, VMamba and AuM keep their arguments in one.
"""

from __future__ import annotations

import argparse
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mambaverse.errors import UserError

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "module")  # where a checkpoint keeps its weights
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
MAX_NAMES = 3  # of missing, unexpected and mismatched keys that an error names
FOREIGN = (  # what the pickle reader raises where other bytes are read as its instructions; it says nothing of use
    KeyError, IndexError, TypeError, AttributeError, AssertionError, OverflowError, struct.error,
)  # fmt: skip


class CheckpointError(UserError):
    """A weights file that cannot be read, or is not of this model."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file, on the CPU.

    A checkpoint that holds more than weights is searched for them under `WRAPPERS`, in that order.

    Raises:
        CheckpointError: no such file, damaged, holds code, or holds no weights.
    """
    content = read_content(path)
    return content if path.suffix == ".safetensors" else find_weights(content, path)


def read_content(path: Path) -> Any:
    """Return all that a weights file holds, on the CPU: the tensors of safetensors, or what `torch.save` wrote.

    Raises:
        CheckpointError: no such file, damaged, or holds code.
    """
    if not path.is_file():
        inside = sorted(map(str, path.glob("*.safetensors")))  # of a run folder: best, last
        raise CheckpointError(f"no weights file {str(path)!r}" + (f", did you mean {inside[0]!r}?" if inside else ""))
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged or not safetensors: {_line(error)}") from None
    return read_torch(path)


def read_torch(path: Path) -> Any:
    """Return what `torch.save` wrote to `path`, on the CPU, if it is made of tensors and plain values only."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" not in str(error):
            raise CheckpointError(f"{path}: damaged, or not written by torch.save") from None  # torch's is an essay
        raise CheckpointError(
            f"{path}: refused, since reading it would run code from the file. Where you trust its source, keep only "
            "its weights: torch.save({'model': torch.load(path, weights_only=False)['model']}, new_path), or of a "
            "whole model torch.save(torch.load(path, weights_only=False).state_dict(), new_path)"
        ) from None
    except FOREIGN:
        raise CheckpointError(f"{path}: damaged, or not written by torch.save: not a pickle") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged, or not written by torch.save: {_line(error)}") from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights file `path` into `model`: the same names and shapes, or CheckpointError."""
    load_state(model, read_weights(path), str(path))


def load_state(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy `weights` into `model`, or change nothing and raise a CheckpointError that names the first differences.

    Likewise for floats that are whole or complex numbers there, not finite, or not there at all.
    """
    own = model.state_dict()
    if without_prefix(own).keys() == own.keys():  # it is not the model's own
        weights = without_prefix(weights)
    if (members := _members(weights)) and not _members(own):
        raise CheckpointError(
            f"{source}: weights of an ensemble of {members} (model.members); expected those of one model: "
            "train it with model.members=1"
        )
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    mismatched = [
        f"{name} {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    if any(found.values()):
        parts = [f"{len(names)} {what} ({_first(names)})" for what, names in found.items() if names]
        raise CheckpointError(f"{source}: weights of another model: {'; '.join(parts)}")
    flaws = {name: flaw for name, tensor in own.items() if (flaw := _flaw(weights[name], tensor.dtype))}
    if flaws:
        found_first = _first([f"{name} {flaw}" for name, flaw in flaws.items()])
        raise CheckpointError(f"{source}: {len(flaws)} of {len(own)} weights cannot be used: {found_first}")
    model.load_state_dict(weights)


def without_prefix(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return `weights` without what wrappers put before every name, in any order (see `PREFIXES`)."""
    weights = dict(weights)
    while weights and (shared := [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in weights)]):
        weights = {name.removeprefix(shared[0]): value for name, value in weights.items()}
    return weights


def wrapper_of(content: Any) -> str | None:
    """Return under which of `WRAPPERS` a checkpoint keeps its weights, None where it is they."""
    if not isinstance(content, Mapping):
        return None
    return next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)


def kept_version(weights: Mapping[str, Any]) -> int:
    """Return the `_version` of the model whose `state_dict()` this is, maybe wrapped: torch keeps it beside them.

    1 is that of a model that states none, and of weights in a dictionary of their own.
    """
    parts = {prefix.rstrip(".") for prefix in PREFIXES} | {""}
    of_modules = getattr(weights, "_metadata", {}).items()
    return max((about.get("version", 1) for name, about in of_modules if set(name.split(".")) <= parts), default=1)


def find_weights(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the weights in what a weights file holds; CheckpointError where there are none."""
    if isinstance(content, Mapping):
        if key := wrapper_of(content):
            content = content[key]
        weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if weights and len(weights) == len(content):
            return weights
    raise CheckpointError(f"{path}: holds no weights; expected a state dict, or one under {', '.join(WRAPPERS)}")


def _members(weights: Mapping[str, Any]) -> int:
    """Return how many models an ensemble's weights are of; 0 for those of one model."""
    return len({name.split(".")[1] for name in weights if name.startswith("members.")})


def _flaw(weight: Tensor, dtype: torch.dtype) -> str:
    """Return why `weight` cannot be copied into a tensor of `dtype` and mean the same; "" where it can."""
    if weight.is_meta:
        return "has no values: it was saved from the device meta"
    if weight.layout != torch.strided or weight.is_quantized:
        return "is sparse or quantized, expected a dense tensor"
    if not dtype.is_floating_point:
        return ""
    if not weight.is_floating_point():
        return f"is of {str(weight.dtype)[6:]}, expected {str(dtype)[6:]} or other floats"
    shortest = weight.float() if weight.itemsize < 2 else weight  # torch has no isfinite of 8 bits
    return "" if shortest.isfinite().all() else "holds numbers that are not finite"


def _first(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or "it ends too early"
