"""The int8 forms of the graphs: packed weights of the step for the native decoder, quantised graphs for the rest."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

from onesearch.arrays import save_arrays
from onesearch.model import OneSearchModel
from onesearch.runtime import INT8_ARRAYS, INT8_PREFILL, INT8_STEP, NORMS, PREFILL_FILE, STEP_FILE

_POSITION_OFFSET = 2


def quantise(model: OneSearchModel, graphs: Path) -> None:
    """Add int8 to a folder that holds the fp32 graphs: the prefill as a graph, the step as native arrays of a BART
    or as a graph of another network."""
    quantise_graph(graphs / PREFILL_FILE, graphs / INT8_PREFILL)
    if model.config.backbone == "bart":
        pack_step(model, graphs / INT8_ARRAYS)
    else:
        quantise_graph(graphs / STEP_FILE, graphs / INT8_STEP)


def pack_step(model: OneSearchModel, target: Path) -> None:
    """Write the step of a BART as the arrays of `onesearch.runtime.STEP_ARRAYS`, one layer per leading row.

    Weights are rounded to int8 with one scale per output channel. Activations are quantised by the decoder, per row.
    """
    decoder, config = model.backbone.decoder, model.config
    arrays: dict[str, list[npt.NDArray[Any]]] = {}
    for layer in decoder.layers:
        own, cross = layer.self_attn, layer.encoder_attn
        products = {
            "own_q": (own.q_proj, own.scaling),
            "own_k": (own.k_proj, 1.0),
            "own_v": (own.v_proj, 1.0),
            "own_out": (own.out_proj, 1.0),
            "cross_q": (cross.q_proj, 1.0),
            "cross_out": (cross.out_proj, 1.0),
            "up": (layer.fc1, 1.0),
            "down": (layer.fc2, 1.0),
        }
        for name, (linear, factor) in products.items():
            weight, scale = quantise_rows(linear.weight * factor)
            for part, array in (("weight", weight), ("scale", scale), ("bias", _array(linear.bias * factor))):
                arrays.setdefault(f"{name}_{part}", []).append(array)
        norms = (layer.self_attn_layer_norm, layer.encoder_attn_layer_norm, layer.final_layer_norm)
        for name, norm in zip(NORMS, norms, strict=True):
            arrays.setdefault(name, []).append(_norm(norm))
    first, codes = config.sid_first_id, sum(config.sid_sizes)
    tokens = [config.bos, *range(first, first + codes)]
    positions = decoder.embed_positions.weight[_POSITION_OFFSET : _POSITION_OFFSET + len(config.sid_sizes)]
    save_arrays(
        target,
        {
            **{name: np.stack(rows) for name, rows in arrays.items()},
            "heads": np.array([config.heads]),
            "embeddings": _array(model.embedding[tokens]),
            "positions": _array(positions),
            "first_norm": _norm(decoder.layernorm_embedding),
            "head_bias": _array(model.head_bias[first : first + codes]),
        },
    )


def quantise_rows(weight: Tensor) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """int8 weight [N, K] and scale float32 [N] with weight ≈ int8 * scale, symmetric, the largest of a row at 127."""
    with torch.no_grad():
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        rounded = torch.round(weight / scale[:, None]).to(torch.int8)
    return rounded.numpy(), scale.numpy()


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().numpy())


def _norm(norm: Any) -> npt.NDArray[np.float32]:
    return np.stack([_array(norm.weight), _array(norm.bias)])


def quantise_graph(source: Path, target: Path) -> None:
    """Write the int8 form of a graph. Products of two activations, and the head, stay in float32.

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
            use_external_data_format=source.with_name(f"{source.name}.data").exists(),
        )
    finally:
        logger.setLevel(level)
