"""Files that are never half written: everything goes to a file or folder beside the target, then is renamed over it.

    path.part  --write, fsync-->  path.part  --rename-->  path

A crash or a full disk at any point leaves what was there before.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from mambaverse.errors import NO_TEXT, UserError

PART = ".part"  # ends the name of what is being written


class SaveError(UserError):
    """Something could not be written: a full disk, a missing right. What was saved before is untouched."""


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn an OSError of the body into a SaveError that names `path`."""
    try:
        yield
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error


def output_path(
    option: str, path: Path | None, suffixes: Collection[str] = (), inputs: Iterable[Path | None] = ()
) -> None:
    """Raise UserError for a file that could not be written after minutes of work, or would replace one of `inputs`."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: no folder {str(path.parent)!r}")
    if path.is_dir():
        raise UserError(f"{option} {path}: that is a folder; expected a file's name")
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"{option} {path}: unknown format {path.suffix!r}; expected {', '.join(sorted(suffixes))}")
    for given in inputs:
        if given is not None and path.exists() and given.exists() and path.samefile(given):
            raise UserError(f"{option} {path}: it would replace the input {given}; name another file")
        if given is not None and path.exists() and given.resolve() in path.resolve().parents:
            raise UserError(f"{option} {path}: is there already, in the input {given}; name another file")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Make `data` the content of `path`, or leave `path` as it is.

    Raises:
        SaveError: the disk is full, or `path` cannot be written.
    """
    part = path.with_name(path.name + PART)
    with saving(path):
        try:
            with open(part, "wb") as file:
                file.write(data.encode(errors=NO_TEXT) if isinstance(data, str) else data)
                sync(file)
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a state dict as safetensors, atomically; tensors that share memory are written one by one."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().contiguous()
        shared = tensor.untyped_storage().data_ptr() in seen
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor.clone() if shared else tensor
    write_atomic(path, safetensors_bytes(tensors, metadata={"format": "pt", **metadata}))


def locked(file: BinaryIO, *, inherited: bool = False) -> bool:
    """Lock an open file; False if it is locked already. True where the system has no such locks.

    Args:
        file: Whose lock the system gives back when the process closes the file, or ends.
        inherited: Whether the lock is of this opening of the file, and goes on in a forked process that has it too;
            else it is of this process alone, which may open the file again, and loses the lock when it closes that.
    """
    if os.name != "posix":
        return True
    import fcntl

    try:
        lock: Any = fcntl.flock if inherited else fcntl.lockf
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target`, which does not exist yet, if the body ends without an error."""
    part = target.with_name(target.name + PART)
    with saving(target):
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            yield part
            _sync_folder(part)
            os.rename(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _sync_folder(target.parent)


def save_torch(path: Path, obj: Any) -> None:
    """`torch.save` to a new file, and to the disk; an OSError comes out as one."""
    with open(path, "wb") as file:
        writer = _Writer(file)
        torch.save(obj, writer)  # type: ignore[arg-type]  # write and flush are all it calls
        if writer.error is not None:
            raise writer.error
        sync(file)


class _Writer:
    """Keeps an OSError for later: torch's zip writer, cut off in mid-file, may abort the process."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.error = file, None

    error: OSError | None

    def write(self, data: bytes) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Left to `save_torch`."""


def sync(file: BinaryIO) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename last; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
