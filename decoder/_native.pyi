"""
Native int8 decoder steps; `onesearch.runtime.Int8Decoder` drives them.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


def kernels() -> list[str]:
    """Names of the kernels this machine can run, fastest first."""

def product(rows: Annotated[NDArray[numpy.uint8], dict(shape=(None, None), order='C', device='cpu', writable=False)], weight: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order='C', device='cpu', writable=False)], kernels: str = '', repeat: int = 1) -> Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C')]:
    """
    Σ_k (rows[i, k] - zero) weight[n, k] as int32 [rows, n], for tests and measurements.
    """

class Model:
    """Packed weights; immutable once filled, shared by all requests."""

    def __init__(self, width: int, heads: int, ffn: int, sizes: Sequence[int], kernels: str = '') -> None: ...

    def set_tables(self, embeddings: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], positions: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], norm: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], head_bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    def add_layer(self, products: Sequence[tuple[Annotated[NDArray[numpy.int8], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]]], norms: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)]]) -> None: ...

    @property
    def kernels(self) -> str: ...

    def start(self, bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], context: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)]]) -> Request:
        """
        Begin a request: bias [S], then keys [h, d, S] and values [h, S, d] per layer.
        """

class Request:
    """State of one search; not to be shared between threads."""

    def step(self, level: int, tokens: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], parents: Annotated[NDArray[numpy.int64], dict(shape=(None,), order='C', device='cpu', writable=False)], threads: int = 1) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C')]:
        """Logits [K, sizes[level]]."""
