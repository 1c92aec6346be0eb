"""`Overlay`: an immutable base trie and a small trie of additions, searched as one. A live catalog in two tries.

Legend: M rows asked, L levels, S = `num_sids`, the base's and the added ones together.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trie._native import Beam
from trie.mask import AnyMask, EdgeMask, OverlayMask
from trie.trie import Codes, SidTrie


class Overlay:
    """The union of two tries with the face of `SidTrie` and exactly its search results. Immutable, thread-safe.

    Leaf indices: the base keeps its own, 0 … base.num_sids - 1; leaf j of `added` is base.num_sids + j. A SID that
    both hold is legal while either leaf is, and found once, by the base's leaf while that is legal. SIDs go away by
    a mask. A search costs time for the additions it meets.
    """

    def __init__(self, base: SidTrie, added: SidTrie) -> None:
        """Raises ValueError when the codebook sizes differ."""
        if added.sizes != base.sizes:
            raise ValueError(f"added trie has sizes {added.sizes}, expected the base's {base.sizes}")
        self.base, self.added = base, added
        self.sizes = base.sizes

    @property
    def num_sids(self) -> int:
        """Leaves S of both tries; a SID that both hold counts twice."""
        return self.base.num_sids + self.added.num_sids

    @property
    def levels(self) -> int:
        """Codes per SID L."""
        return self.base.levels

    @property
    def nbytes(self) -> int:
        """Bytes of both tries."""
        return self.base.nbytes + self.added.nbytes

    def index(self, codes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Leaf index of each SID of codes [M, L], the base's if it has one, int64 [M]; -1 where absent.

        Raises ValueError as `SidTrie`.
        """
        found, more = self.base.index(codes), self.added.index(codes)
        return np.where((found < 0) & (more >= 0), more + self.base.num_sids, found)

    def contains(self, codes: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether each SID of codes [M, L] is in either trie, bool [M]. Raises ValueError as `SidTrie`."""
        return self.index(codes) >= 0

    def children(self, prefix: Sequence[int]) -> Codes:
        """Codes that may follow a prefix, uint16, ascending. Raises ValueError as `SidTrie`."""
        return np.union1d(self.base.children(prefix), self.added.children(prefix))

    def sids(self) -> Codes:
        """All SIDs, uint16 [S, L], by leaf index: the base's in order, then the added ones in order."""
        return np.concatenate([self.base.sids(), self.added.sids()])

    def subset(self, mask: npt.ArrayLike) -> OverlayMask:
        """Legal edges when only the SIDs with mask[leaf index] are legal; bool [S]. Raises ValueError as `SidTrie`."""
        array = np.asarray(mask)
        if array.dtype != np.bool_ or array.shape != (self.num_sids,):
            raise ValueError(f"mask is {array.dtype} {array.shape}, expected bool ({self.num_sids},)")
        return OverlayMask(
            self.base.subset(array[: self.base.num_sids]), self.added.subset(array[self.base.num_sids :])
        )

    def all(self) -> OverlayMask:
        """The mask under which everything is legal."""
        return OverlayMask(self.base.all(), self.added.all())

    def beam(
        self, width: int, top_n: int, *, legal: bool = False, mask: AnyMask | None = None, chunk: int = 0
    ) -> Beam:
        """State of one beam search, as `SidTrie.beam`. Raises ValueError unless 1 <= top_n <= width and the mask is
        one of these two tries."""
        if isinstance(mask, EdgeMask):
            raise ValueError("the mask belongs to a trie, expected one of this overlay")
        base, added = (mask.base, mask.added) if mask else (None, None)
        return Beam(self.base.native, width, top_n, legal, base, chunk, added=self.added.native, added_mask=added)


AnyTrie = SidTrie | Overlay
