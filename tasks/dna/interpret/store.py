"""Arrays of embeddings in files that grow while they are made: .npz, and .parquet where pyarrow is installed.

    .npz        names (R,), lengths (R,), embeddings float32 (R, D); of bases (Σ lengths, D), record r being the rows
                offsets[r] to offsets[r + 1]; about, JSON
    .parquet    name, length, embedding: D numbers, of bases a list of D numbers for each; about, in the metadata

Memory is that of the names and of what is written at a time: the numbers of an .npz lie in a file beside it until their
count, which stands before them, is known. An .npz is read by numpy.load, without pickles.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from mambaverse.engine.files import PART, saving
from mambaverse.errors import UserError

FORMATS = (".npz", ".parquet")


class Store(Protocol):
    """A file of embeddings; leaving its block gives it its name, unless by an error, which leaves nothing."""

    def write(self, names: Sequence[str], lengths: Sequence[int], values: Sequence[np.ndarray]) -> None:
        """Append records: their names, bases, and embeddings (D,), or of bases (length, D), float32."""

    def __enter__(self) -> Store: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_store(path: Path, dim: int, per_base: bool, about: dict[str, Any]) -> Store:
    """Return the store that the suffix of `path` says.

    Args:
        path: .npz or .parquet.
        dim: D.
        per_base: Whether a record has an embedding for each of its bases.
        about: What the numbers are, as JSON.

    Raises:
        UserError: .parquet without pyarrow.
    """
    return (_Parquet if path.suffix.lower() == ".parquet" else _Npz)(path, dim, per_base, about)


class _Npz:
    def __init__(self, path: Path, dim: int, per_base: bool, about: dict[str, Any]) -> None:
        self._path, self._dim, self._per_base, self._about = path, dim, per_base, about
        self._part, self._raw = path.with_name(path.name + PART), path.with_name(path.name + ".values" + PART)
        self._names: list[str] = []
        self._lengths: list[int] = []
        with saving(self._raw):
            self._file = self._raw.open("w+b")

    def __enter__(self) -> _Npz:
        return self

    def write(self, names: Sequence[str], lengths: Sequence[int], values: Sequence[np.ndarray]) -> None:
        self._names += names
        self._lengths += lengths
        with saving(self._raw):
            for value in values:
                self._file.write(np.ascontiguousarray(value, np.float32).tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with saving(self._path):
                    self._finish()
                    os.replace(self._part, self._path)
        finally:
            try:
                with saving(self._path):
                    self._file.close()  # writes what is left, for which a full disk has no room
            finally:
                self._raw.unlink(missing_ok=True)
                self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        lengths = np.array(self._lengths, np.int64)
        small = {
            "names": np.array(self._names, np.str_),
            "lengths": lengths,
            "about": np.array(json.dumps(self._about)),
        }
        if self._per_base:
            small["offsets"] = np.concatenate([[0], np.cumsum(lengths)])
        rows = int(lengths.sum()) if self._per_base else len(lengths)
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, self._dim)}
        with zipfile.ZipFile(self._part, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, array in small.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
            with archive.open("embeddings.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                self._file.seek(0)
                shutil.copyfileobj(self._file, member, 1 << 22)


class _Parquet:
    def __init__(self, path: Path, dim: int, per_base: bool, about: dict[str, Any]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError(
                f"--out {path}: .parquet needs pyarrow, which is not installed: pip install pyarrow; or name an .npz"
            ) from None
        self._arrow: Any = pyarrow
        self._path, self._part = path, path.with_name(path.name + PART)
        vector = pyarrow.list_(pyarrow.float32(), dim)
        embedding = pyarrow.list_(vector) if per_base else vector
        fields = [("name", pyarrow.string()), ("length", pyarrow.int64()), ("embedding", embedding)]
        self._schema = pyarrow.schema(fields, metadata={"about": json.dumps(about)})
        self._vector, self._per_base = vector, per_base
        with saving(self._part):
            self._writer: Any = parquet.ParquetWriter(self._part, self._schema)

    def __enter__(self) -> _Parquet:
        return self

    def write(self, names: Sequence[str], lengths: Sequence[int], values: Sequence[np.ndarray]) -> None:
        arrow = self._arrow
        flat = arrow.array(np.concatenate([np.ravel(value) for value in values]).astype(np.float32))
        vectors = arrow.FixedSizeListArray.from_arrays(flat, type=self._vector)
        if self._per_base:
            offsets = arrow.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
            vectors = arrow.ListArray.from_arrays(offsets, vectors, type=self._schema.field("embedding").type)
        columns = [arrow.array(names, arrow.string()), arrow.array(lengths, arrow.int64()), vectors]
        with saving(self._part):
            self._writer.write_batch(arrow.record_batch(columns, schema=self._schema))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with saving(self._path):
            self._writer.close()
            if kind is None:
                os.replace(self._part, self._path)
            else:
                self._part.unlink(missing_ok=True)
