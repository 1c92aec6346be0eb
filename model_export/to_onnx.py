"""The two decoder graphs of a model as ONNX files, with named inputs, outputs and dynamic axes.

    prefill.onnx  ids [1, S], mask [1, S], history [1, R, 3, E] -> context_*
    step.onnx     tokens [K], parents [K], head [H], context_*, state_* [t, P, W] -> logits [K, H], grown_* [t+1, K, W]

History and logits are float32; context and state have the type of the weights.

Legend: S prompt tokens, R behaviours, E history width, K beams, P beams of the previous step, t steps taken, H codes of
a level, W width of a beam's keys.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from onesearch.model import OneSearchModel, Prefill, Step

OPSET = 20


def export_prefill(model: OneSearchModel, path: Path) -> None:
    """Write the prefill graph."""
    prompt = Dim("prompt", min=1, max=model.config.max_positions)
    write_graph(
        Prefill(model),
        _prompt(model),
        ({1: prompt}, {1: prompt}, None),
        ["ids", "mask", "history"],
        _context_names(model),
        path,
    )


def export_step(model: OneSearchModel, path: Path) -> None:
    """Write the step graph. t may be 0 with one row that no beam reads: the state before the first step."""
    layers, width = model.config.decoder_layers, model.config.state_width
    prompt = Dim("prompt", min=1, max=model.config.max_positions)
    beams, previous, steps, codes = Dim("beams"), Dim("previous"), Dim("steps", max=_MAX_STEPS), Dim("codes")
    with torch.no_grad():
        context = Prefill(model)(*_prompt(model))
    # The exporter would merge inputs that are one object: every input needs a tensor of its own.
    tokens, parents, head = (torch.zeros(size, dtype=torch.int64) for size in (5, 5, 4))
    state = [context[0].new_zeros(2, 3, width) for _ in range(2 * layers)]
    write_graph(
        Step(model),
        (tokens, parents, head, context, state),
        (
            *({0: beams}, {0: beams}, {0: codes}),
            [{0: prompt}, *[{2: prompt}, {1: prompt}] * layers],
            [{0: steps, 1: previous}] * len(state),
        ),
        ["tokens", "parents", "head", *_context_names(model), *_layer_names("state", layers)],
        ["logits", *_layer_names("grown", layers)],
        path,
    )


_MAX_STEPS = 64
_INLINE_BYTES = 1 << 30  # a protobuf file ends at 2 GiB; larger weights lie beside their graph
_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def typed(model: OneSearchModel, kind: str) -> OneSearchModel:
    """A copy of the model with weights of type fp32, fp16 or bf16; buffers (rotary frequencies) stay as they are."""
    copy = deepcopy(model)
    for parameter in copy.parameters():
        parameter.data = parameter.data.to(_TYPES[kind])
    return copy


def _layer_names(kind: str, layers: int) -> list[str]:
    return [f"{kind}_{part}_{layer}" for layer in range(layers) for part in ("keys", "values")]


def _context_names(model: OneSearchModel) -> list[str]:
    return ["context_mask", *_layer_names("context", model.config.decoder_layers)]


def _prompt(model: OneSearchModel) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.full((1, 7), model.config.bos)
    return ids, torch.ones_like(ids), torch.zeros(1, *model.config.history_shape)


def write_graph(
    module: nn.Module,
    inputs: tuple[Any, ...],
    shapes: tuple[Any, ...] | None,
    input_names: Sequence[str],
    output_names: Sequence[str],
    path: Path,
) -> None:
    """Trace a module and write it, free of traces of this machine; shapes None makes every axis static."""
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    # The exporter leaves stack traces with local paths and shapes of intermediate values: neither belongs in a
    # bundle, and both keep the same weights from giving the same file elsewhere.
    del proto.graph.value_info[:]
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
    weights = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    onnx.save(proto, path, save_as_external_data=weights > _INLINE_BYTES, location=f"{path.name}.data")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about torchvision, which is not used, its own deprecated calls, and axes of equal size."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name", UserWarning)
            yield
    finally:
        logger.setLevel(level)
