"""The least time a search can take: the multiply-adds it cannot avoid over the measured peak of this machine."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import decoder
from onesearch.model_config import ModelConfig


def multiply_adds(config: ModelConfig, prompt: int, beams: tuple[int, ...]) -> int:
    """Multiply-adds of one search: what a beam search of these widths cannot avoid, the softmax apart.

    beams: rows asked of the model on each level.
    """
    width, ffn = config.d_model, config.ffn
    encoder = prompt * (4 * width * width + 2 * width * ffn + 2 * prompt * width) * config.encoder_layers
    context = prompt * 2 * width * width * config.decoder_layers
    step = 6 * width * width + 2 * width * ffn + 2 * prompt * width
    rows = [
        k * ((step + 2 * (level + 1) * width) * config.decoder_layers + width * size)
        for level, (k, size) in enumerate(zip(beams, config.sid_sizes, strict=True))
    ]
    return encoder + context + sum(rows)


def peak_int8(threads: int) -> float:
    """Multiply-adds per second of that many cores when a product stays in the first cache: the machine's own limit."""
    rng = np.random.default_rng(0)
    rows, weight = (
        rng.integers(1, 100, (28, 768)).astype(np.uint8),
        rng.integers(-127, 128, (32, 768)).astype(np.int8),
    )
    return _peak(lambda repeat: decoder.product(rows, weight, "", repeat), 28 * 768 * 32, threads)


def peak_fp32(threads: int) -> float:
    """The same in float32, by torch's (oneDNN's) matrix product at the size that suits it."""
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    out = torch.empty(1024, 1024)

    def run(repeat: int) -> None:
        for _ in range(repeat):
            torch.mm(a, b, out=out)

    torch.set_num_threads(threads)
    best = max(_rate(lambda: run(20), 20 * 1024**3) for _ in range(7))
    return best


def _peak(run: Callable[[int], object], size: int, threads: int, repeat: int = 3000) -> float:
    with ThreadPoolExecutor(threads) as pool:
        both = lambda: list(pool.map(run, [repeat] * threads))  # noqa: E731
        return max(_rate(both, threads * repeat * size) for _ in range(9))


def _rate(call: Callable[[], object], work: int) -> float:
    start = time.perf_counter()
    call()
    return work / (time.perf_counter() - start)
