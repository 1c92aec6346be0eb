"""The int8 variant of the step graph: weights of the matrix products in 8 bits, activations quantised on the fly."""

import logging
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic


def quantise_step(source: Path, target: Path) -> None:
    """Write the int8 form of a step graph. Products of two activations, and the head, stay in float32.

    Weights use 7 of the 8 bits, with one scale per output channel: on CPUs without VNNI the 8-bit product
    saturates its 16-bit partial sums, and a bundle may be served on another machine than it was exported on.
    """
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises to infer shapes first, which adds nothing to this graph
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logger.setLevel(level)
