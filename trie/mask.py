"""The two kinds of masks: which SIDs of a trie, or of an overlay, are legal under a filter. Immutable."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

try:
    from trie._native import EdgeMask
except ImportError as error:
    raise ImportError("trie._native is not built; run: pip install --no-build-isolation -e .") from error

__all__ = ["AnyMask", "EdgeMask", "OverlayMask"]


@dataclass(frozen=True)
class OverlayMask:
    """Legal edges of an overlay: a mask of each of its tries. The base's may be cached and shared between overlays."""

    base: EdgeMask
    added: EdgeMask

    @property
    def num_legal(self) -> int:
        """Legal SIDs."""
        return self.base.num_legal + self.added.num_legal

    @property
    def nbytes(self) -> int:
        """Bytes of both masks."""
        return self.base.nbytes + self.added.nbytes

    def legal(self) -> npt.NDArray[np.bool_]:
        """Whether each SID is legal, by leaf index of the overlay, bool [S]: what `subset` was given."""
        return np.concatenate([self.base.legal(), self.added.legal()])

    def without(self, leaves: npt.NDArray[np.int64]) -> "OverlayMask":
        """This mask less some leaf indices of the overlay. Raises ValueError for an index outside 0 … S - 1."""
        added = leaves >= self.base.num_sids
        return OverlayMask(
            self.base.without(leaves[~added]), self.added.without(leaves[added] - self.base.num_sids)
        )


AnyMask = EdgeMask | OverlayMask
