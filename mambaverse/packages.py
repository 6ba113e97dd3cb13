"""Data out of package files: a Debian .deb or a Python .whl is unpacked without any tool of its distribution.

A .deb is an `ar` archive: a magic line, then members, each a header of 60 bytes (the name in the first 16, the size in
decimal at byte 48) and its bytes, padded to an even number; its files are in data.tar.{gz,xz,zst} (man 5 deb).
"""

from __future__ import annotations

import io
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mambaverse.errors import UserError

SUFFIXES = (".deb", ".whl")
DAMAGED = (  # RuntimeError: encrypted, or compressed in a way that zipfile does not know
    OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, RuntimeError,
)  # fmt: skip
_MAGIC, _HEADER = b"!<arch>\n", 60


def is_package(path: Path) -> bool:
    """Whether `path` is a package file."""
    return path.suffix in SUFFIXES and path.is_file()


@contextmanager
def unpacked(package: Path) -> Iterator[Path]:
    """Unpack a .deb or .whl into a folder that lives as long as the context.

    Raises:
        UserError: the file is damaged, or compressed in a way that this Python cannot read.
    """
    with tempfile.TemporaryDirectory(prefix="mambaverse-") as folder:
        try:
            if package.suffix == ".deb":
                _unpack_deb(package, Path(folder))
            else:
                with zipfile.ZipFile(package) as archive:
                    archive.extractall(folder)
        except DAMAGED as error:
            raise UserError(f"{package}: a damaged package ({' '.join(str(error).split())}); get it again") from None
        yield Path(folder)


def _unpack_deb(package: Path, folder: Path) -> None:
    with package.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise tarfile.TarError("it does not begin as a .deb does")
        while header := file.read(_HEADER):
            if len(header) < _HEADER:
                raise EOFError("it is cut short")
            name, number = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58].strip()
            if not number.isdigit():
                raise tarfile.TarError(f"a member's size is {number.decode('ascii', 'replace')!r}")
            size = int(number)
            content = file.read(size + size % 2)
            if len(content) < size:
                raise EOFError("it is cut short")
            if name.startswith("data.tar"):
                if name.endswith(".zst"):
                    raise UserError(f"{package}: compressed with zstd; unpack it with `dpkg -x` and give the folder")
                with tarfile.open(fileobj=io.BytesIO(content[:size])) as archive:
                    archive.extractall(folder, filter="data")
                return
    raise tarfile.TarError("it has no data.tar")
