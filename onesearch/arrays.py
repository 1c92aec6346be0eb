"""NumPy archives on disk: written to a temporary name and renamed, read without pickle, every fault listed."""

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onesearch.errors import BundleError

# What a damaged or foreign archive can make numpy and zipfile raise; MemoryError comes from a forged shape.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `path` so that a reader sees the old file or the new one, never a half. Makes parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def save_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write named arrays as one uncompressed `.npz`; equal arrays give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    temporary.replace(path)


def load_arrays(
    path: Path, expected: Mapping[str, tuple[str, int]], optional: Mapping[str, tuple[str, int]] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Read a `.npz` that must hold exactly the arrays `name -> (dtype, number of dimensions)`, finite if floats.

    The arrays of `optional` are there all together or not at all. Raises BundleError listing every missing, unknown,
    unreadable or ill-typed array.
    """
    try:
        archive = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except _UNREADABLE as error:
        raise BundleError(str(path), [f"cannot be read as .npz: {error}"]) from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise BundleError(str(path), ["holds a bare array, expected a .npz archive"])
    arrays: dict[str, npt.NDArray[Any]] = {}
    with archive:
        if optional and set(optional) & set(archive.files):
            expected = {**expected, **optional}
        faults = [f"array {name!r}: unknown" for name in archive.files if name not in expected]
        for name, (dtype, ndim) in expected.items():
            try:
                array = archive[name]
            except _UNREADABLE as error:
                faults.append(f"array {name!r}: missing or unreadable ({error})")
                continue
            faults += [f"array {name!r}: {fault}" for fault in _array_faults(array, np.dtype(dtype), ndim)]
            arrays[name] = array
    if faults:
        raise BundleError(str(path), faults)
    return arrays


def _array_faults(array: npt.NDArray[Any], dtype: np.dtype[Any], ndim: int) -> list[str]:
    faults = []
    if array.dtype != dtype:
        faults.append(f"dtype {array.dtype}, expected {dtype}")
    if array.ndim != ndim or array.size == 0:
        faults.append(f"shape {array.shape}, expected {ndim} non-empty dimensions")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        faults.append("holds values that are not finite")
    return faults
