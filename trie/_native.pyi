"""Native trie and beam kernels; use them through `trie.SidTrie`."""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


class Trie:
    """Immutable prefix trie of SIDs over one byte image."""

    @staticmethod
    def build(codes: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu', writable=False)], sizes: Sequence[int]) -> Trie:
        """Build from codes [N, L]; duplicates are allowed."""

    @staticmethod
    def open(image: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Trie:
        """Verify and view an image; it is kept alive, not copied."""

    @property
    def num_sids(self) -> int: ...

    @property
    def sizes(self) -> list[int]: ...

    def image(self) -> Annotated[NDArray[numpy.uint8], dict(shape=(None,), writable=False)]:
        """All bytes of the trie, read-only, without a copy."""

    def index(self, codes: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C')]:
        """Leaf index of each SID of codes [M, L], -1 when absent."""

    def children(self, prefix: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C')]:
        """Codes that may follow a prefix, ascending."""

    def sids(self) -> Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C')]:
        """All SIDs in order, [num_sids, L]."""

class EdgeMask:
    """Legal edges of one trie under a filter, one bit per edge; immutable."""

    def __init__(self, trie: Trie, legal: Annotated[NDArray[numpy.bool_], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    @staticmethod
    def all(trie: Trie) -> EdgeMask:
        """Every SID is legal."""

    def without(self, leaves: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> EdgeMask:
        """This mask less some leaf indices; ValueError for one out of range."""

    @property
    def num_sids(self) -> int:
        """SIDs, legal or not."""

    def legal(self) -> Annotated[NDArray[numpy.bool_], dict(shape=(None,), order='C')]:
        """Whether each SID is legal, by leaf index: what `subset` was given."""

    @property
    def num_legal(self) -> int:
        """Legal SIDs."""

    @property
    def nbytes(self) -> int: ...

class Beam:
    """State of one beam search; not to be shared between threads."""

    def __init__(self, trie: Trie, width: int, top_n: int, legal: bool, mask: EdgeMask | None = None, chunk: int = 0, added: Trie | None = None, added_mask: EdgeMask | None = None) -> None: ...

    @property
    def level(self) -> int:
        """Levels finished so far."""

    @property
    def rows(self) -> int:
        """Rows that need logits for the next advance."""

    def codes(self) -> Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C')]:
        """Prefix of each row, [rows, t], in code order."""

    def parents(self) -> Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C')]:
        """Row of each row's parent among the rows of the previous level."""

    def advance(self, logits: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> None:
        """
        Expand the current rows with raw logits [rows, sizes[t]]; on the last level more rows may follow.
        """

    @property
    def kept(self) -> list[int]:
        """Beams kept on each level so far."""

    def results(self) -> tuple[Annotated[NDArray[numpy.uint16], dict(shape=(None, None), order='C')], Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C')], Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C')]]:
        """
        (codes [n, L], scores [n], leaves [n]), best first; after the last level.
        """
