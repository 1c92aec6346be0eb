"""`SidTrie`: the typed face of the native trie. Owns validation and the file; knows nothing else of ours.

Legend: N rows given, L levels, M rows asked, S = `num_sids` distinct SIDs.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from trie._native import Beam, Trie
from trie.mask import AnyMask, EdgeMask

__all__ = ["Beam", "EdgeMask", "SidTrie"]

Codes = npt.NDArray[np.uint16]


class SidTrie:
    """All live SIDs as an immutable prefix trie. Safe to share between threads.

    A SID's *leaf index* is its rank among the distinct SIDs in code order, 0 … S - 1.
    """

    def __init__(self, native: Trie) -> None:
        self.native = native  # for this package only
        self.sizes: tuple[int, ...] = tuple(native.sizes)

    @classmethod
    def build(cls, codes: npt.ArrayLike, sizes: Sequence[int]) -> Self:
        """Build from codes [N, L] of any integer type, duplicates allowed, and L codebook sizes in 1..65536.

        Raises ValueError for a wrong shape, type or size and for a code outside its codebook, naming its row and
        column. L is 1..8; N may be 0.
        """
        array = _integers(codes, "codes")
        if array.ndim != 2:
            raise ValueError(f"codes has {array.ndim} dimensions, expected 2 (items, levels)")
        whole = _sizes(sizes)
        if array.dtype != np.uint16:
            _check_range(array, whole)
        return cls(Trie.build(np.ascontiguousarray(array, dtype=np.uint16), whole))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Memory-map a saved trie. Header, checksum and every bound are verified.

        Raises ValueError, naming the path, for a damaged, truncated or foreign file; OSError when it cannot be read.
        """
        with Path(path).open("rb") as file:
            try:
                image = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | _POPULATE, prot=mmap.PROT_READ)
                return cls(Trie.open(np.frombuffer(image, dtype=np.uint8)))
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trie: to a temporary file beside `path`, then renamed, so readers never see half a file."""
        target = Path(path)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(self.native.image().data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @property
    def num_sids(self) -> int:
        """Distinct SIDs S."""
        return self.native.num_sids

    @property
    def levels(self) -> int:
        """Codes per SID L."""
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole index, in memory and in the file."""
        return int(self.native.image().nbytes)

    def index(self, codes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Leaf index of each SID of codes [M, L], int64 [M]; -1 where the trie does not hold it.

        Raises ValueError for a wrong shape or type. Codes outside their codebook are simply absent.
        """
        array = _integers(codes, "codes")
        if array.ndim != 2 or array.shape[1] != self.levels:
            raise ValueError(f"codes has shape {array.shape}, expected (rows, {self.levels})")
        if array.dtype == np.uint16:
            return self.native.index(np.ascontiguousarray(array))
        fits = ((array >= 0) & (array <= 0xFFFF)).all(axis=1)
        found = self.native.index(np.ascontiguousarray(array, dtype=np.uint16))
        return np.where(fits, found, np.int64(-1))

    def contains(self, codes: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether each SID of codes [M, L] is in the trie, bool [M]. Raises ValueError for a wrong shape or type."""
        return self.index(codes) >= 0

    def children(self, prefix: Sequence[int]) -> Codes:
        """Codes that may follow a prefix of t < L codes, uint16, ascending; empty when no SID starts with it.

        Raises ValueError when the prefix is not a sequence of fewer than L integers.
        """
        array = _integers(prefix, "prefix")
        if array.ndim != 1 or len(array) >= self.levels:
            raise ValueError(f"prefix has shape {array.shape}, expected fewer than {self.levels} codes")
        if ((array < 0) | (array > 0xFFFF)).any():
            return np.empty(0, dtype=np.uint16)
        return self.native.children(np.ascontiguousarray(array, dtype=np.uint16))

    def sids(self) -> Codes:
        """All distinct SIDs in order, uint16 [S, L]; row i is the SID of leaf index i."""
        return self.native.sids()

    def subset(self, mask: npt.ArrayLike) -> EdgeMask:
        """Legal edges when only the SIDs with mask[leaf index] are legal; bool [S]. Costs 1 bit per edge.

        Raises ValueError for a wrong length or type.
        """
        array = np.asarray(mask)
        if array.dtype != np.bool_ or array.shape != (self.num_sids,):
            raise ValueError(f"mask is {array.dtype} {array.shape}, expected bool ({self.num_sids},)")
        return EdgeMask(self.native, np.ascontiguousarray(array))

    def all(self) -> EdgeMask:
        """The mask under which everything is legal: `trie.all().without(leaves)` takes some SIDs away."""
        return EdgeMask.all(self.native)

    def beam(
        self, width: int, top_n: int, *, legal: bool = False, mask: AnyMask | None = None, chunk: int = 0
    ) -> Beam:
        """State of one beam search (used by `onesearch.decode`); chunk > 0 asks for that many rows at a time on the
        last level. Raises ValueError unless 1 <= top_n <= width and the mask is one of this trie."""
        if mask is not None and not isinstance(mask, EdgeMask):
            raise ValueError(
                f"the mask belongs to no trie of this kind: it is {type(mask).__name__}, expected EdgeMask"
            )
        return Beam(self.native, width, top_n, legal, mask, chunk)


_POPULATE: int = getattr(mmap, "MAP_POPULATE", 0)  # Linux: one call maps all pages instead of a fault for each


def _sizes(sizes: Sequence[int]) -> list[int]:
    array = _integers(sizes, "sizes")
    if array.ndim != 1:
        raise ValueError(f"sizes has {array.ndim} dimensions, expected 1 (levels)")
    for level, size in enumerate(array.tolist()):
        if not 1 <= size <= 65536:
            raise ValueError(f"sizes[{level}] is {size}, expected 1..65536")
    return [int(size) for size in array]


def _integers(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.size == 0 and array.dtype == np.float64:  # NumPy's type for an empty list
        array = array.astype(np.uint16)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} is {array.dtype}, expected integers")
    return array


def _check_range(codes: npt.NDArray[Any], sizes: list[int]) -> None:
    if codes.shape[1] != len(sizes):
        raise ValueError(f"codes has {codes.shape[1]} columns, sizes has {len(sizes)} levels")
    bad = (codes < 0) | (codes >= np.asarray(sizes))
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(f"codes[{row}, {column}] is {codes[row, column]}, expected 0..{sizes[column] - 1}")
