"""In-process decoding: ONNX Runtime (the reference), the native int8 decoder, and the bookkeeping every decoder
shares. Knows no torch.

Legend: K beams, P beams of the previous step, t steps taken, S prompt tokens, H codes of a level, N layers,
D model width, F feed-forward width, C codes of all levels.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from decoder import Model, Request
from onesearch.arrays import load_arrays
from onesearch.decode import StepFn
from onesearch.errors import BundleError, ConfigError
from onesearch.sequence import Prompt
from onesearch.sid import LEVELS, Codes, SidVocab

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Precision = Literal["fp32", "int8"]
State = TypeVar("State")

PREFILL_FILE, STEP_FILE = "prefill.onnx", "step.onnx"
INT8_PREFILL, INT8_STEP, INT8_ARRAYS = "prefill.int8.onnx", "step.int8.onnx", "step.int8.npz"
PRODUCTS = ("own_q", "own_k", "own_v", "own_out", "cross_q", "cross_out", "up", "down")
NORMS = ("own_norm", "cross_norm", "last_norm")
STEP_ARRAYS: dict[str, tuple[str, int]] = {
    **{f"{name}_weight": ("int8", 3) for name in PRODUCTS},  # [N, outputs, inputs]
    **{f"{name}_{part}": ("float32", 2) for name in PRODUCTS for part in ("scale", "bias")},  # [N, outputs]
    **dict.fromkeys(NORMS, ("float32", 3)),  # [N, 2, D]: gain, bias
    "first_norm": ("float32", 2),  # [2, D], after the embedding
    "embeddings": ("float32", 2),  # [1 + C, D]: BOS, then the SID tokens in order; also the head
    "positions": ("float32", 2),  # [L, D]
    "head_bias": ("float32", 1),  # [C]
    "heads": ("int64", 1),  # [1]
}
"""What `step.int8.npz` holds: name -> dtype and number of dimensions."""


class Decoder(Protocol):
    """Starts a request. Implementations are thread-safe; the returned function belongs to one request."""

    def start(self, prompt: Prompt) -> StepFn:
        """Read the prompt; the result maps codes uint16 [K, t] and parents int64 [K] to logits [K, sizes[t]]."""
        ...


class BeamSteps(Generic[State]):
    """The step function of one request: turns beam codes into tokens and keeps the decoder's state between calls.

    run(tokens int64 [K], parents int64 [K], head int64 [H], state) -> logits float32 [K, H], new state.
    """

    def __init__(
        self, run: Callable[[Ids, Ids, Ids, State], tuple[Logits, State]], empty: State, vocab: SidVocab, bos: int
    ) -> None:
        self._run, self._state, self._vocab, self._bos = run, empty, vocab, bos
        self._level = 0

    def __call__(self, codes: Codes, parents: Ids, /) -> Logits:
        """Logits float32 [K, sizes[t]] after codes uint16 [K, t]; parents int64 [K] are rows of level t - 1.

        Raises ValueError unless t is 0 on the first call and one more on every next call. Only the last level may
        be asked several times, each time with rows of its own: nothing of it is kept.
        """
        if codes.shape[1] != self._level:
            raise ValueError(f"codes have {codes.shape[1]} levels, expected {self._level} on this call")
        tokens = np.full(len(codes), self._bos)
        if self._level:
            tokens = np.ascontiguousarray(self._vocab.token_ids(codes)[:, -1])
        head = np.arange(*self._vocab.level_range(self._level))
        logits, state = self._run(tokens, np.ascontiguousarray(parents, np.int64), head, self._state)
        if self._level + 1 < LEVELS:
            self._level, self._state = self._level + 1, state
        return logits


def open_decoder(
    graphs: Path, vocab: SidVocab, bos: int, threads: int, precision: Precision = "fp32"
) -> "OnnxDecoder | Int8Decoder":
    """The decoder of a graph folder: int8 steps are native where the export wrote `step.int8.npz`, else a graph.

    threads is the number of cores one request may use. Raises ConfigError when a graph is missing or cannot be read.
    """
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise ConfigError(f"precision: {precision!r} is unknown, expected one of {known}")
    if precision == "int8" and (graphs / INT8_ARRAYS).exists():
        return Int8Decoder(graphs, vocab, bos, threads)
    return OnnxDecoder(graphs, vocab, bos, threads, precision)


class _Prefill:
    """The prefill graph: one prompt in, the context of its beams out."""

    def __init__(self, graphs: Path, threads: int, precision: Precision) -> None:
        self._session = _session(graphs / (PREFILL_FILE if precision == "fp32" else INT8_PREFILL), threads)
        self.names = [output.name for output in self._session.get_outputs()]

    def __call__(self, prompt: Prompt) -> list[npt.NDArray[Any]]:
        ids = prompt.ids[None]
        inputs = {"ids": ids, "mask": np.ones_like(ids), "history": prompt.history[None]}
        outputs: list[npt.NDArray[Any]] = self._session.run(self.names, inputs)
        return outputs


class OnnxDecoder:
    """Runs the exported graphs of a bundle on the CPU; the state that a step returns is handed to the next.

    graphs holds prefill.onnx and step.onnx (fp32) or prefill.int8.onnx and step.int8.onnx (int8). threads is the
    number of cores one request may use. Raises ConfigError when a graph is missing or cannot be read.
    """

    def __init__(
        self, graphs: Path, vocab: SidVocab, bos: int, threads: int, precision: Precision = "fp32"
    ) -> None:
        self._vocab, self._bos = vocab, bos
        self._prefill = _Prefill(graphs, threads, precision)
        self._step = _session(graphs / (STEP_FILE if precision == "fp32" else INT8_STEP), threads)
        states = [i for i in self._step.get_inputs() if i.name.startswith("state_")]
        self._states = [i.name for i in states]
        self._width = int(states[0].shape[-1])
        self._dtype = np.float16 if states[0].type == "tensor(float16)" else np.float32

    def start(self, prompt: Prompt) -> StepFn:
        """Read one prompt; the result scores the next level of its beams."""
        context = dict(zip(self._prefill.names, self._prefill(prompt), strict=True))

        def run(tokens: Ids, parents: Ids, head: Ids, state: list[Any]) -> tuple[Logits, list[Any]]:
            feeds = {"tokens": tokens, "parents": parents, "head": head}
            feeds |= context | dict(zip(self._states, state, strict=True))
            logits, *grown = self._step.run(None, feeds)
            return logits, grown

        empty = np.empty((0, 1, self._width), dtype=self._dtype)
        return BeamSteps(run, [empty] * len(self._states), self._vocab, self._bos)


class Int8Decoder:
    """Prefill by ONNX Runtime, steps by the native int8 decoder, whose memory is used again by later requests.

    graphs holds prefill.int8.onnx and step.int8.npz; threads is the number of cores one request may use; kernels names
    an instruction set of `decoder.kernels()`, the fastest by default. Raises ConfigError when a file is missing or
    cannot be read.
    """

    def __init__(self, graphs: Path, vocab: SidVocab, bos: int, threads: int, kernels: str = "") -> None:
        self._vocab, self._bos, self._threads = vocab, bos, threads
        self._prefill = _Prefill(graphs, threads, "int8")
        try:
            self._model = _native_model(load_arrays(graphs / INT8_ARRAYS, STEP_ARRAYS), vocab, kernels)
        except (BundleError, ValueError) as error:
            raise ConfigError(f"graph {graphs / INT8_ARRAYS}: {error}") from error

    def start(self, prompt: Prompt) -> StepFn:
        """Read one prompt; the result scores the next level of its beams."""
        bias, *context = self._prefill(prompt)

        def run(
            tokens: Ids, parents: Ids, head: Ids, state: tuple[Request, int]
        ) -> tuple[Logits, tuple[Request, int]]:
            request, level = state
            rows = tokens - self._vocab.first_id + 1 if level else np.zeros_like(tokens)
            return request.step(level, rows, parents, self._threads), (request, level + 1)

        return BeamSteps(run, (self._model.start(bias, context), 0), self._vocab, self._bos)


def _native_model(arrays: Mapping[str, npt.NDArray[Any]], vocab: SidVocab, kernels: str) -> Model:
    ffn, width = arrays["up_weight"].shape[1:]
    model = Model(width, int(arrays["heads"][0]), ffn, list(vocab.spec.sizes), kernels)
    model.set_tables(arrays["embeddings"], arrays["positions"], arrays["first_norm"], arrays["head_bias"])
    for i in range(len(arrays["up_weight"])):
        products = [
            tuple(arrays[f"{name}_{part}"][i] for part in ("weight", "scale", "bias")) for name in PRODUCTS
        ]
        model.add_layer(products, [arrays[name][i] for name in NORMS])
    return model


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    if not path.exists():
        raise ConfigError(f"graph {path}: is missing; export the bundle again, for int8 with --precision int8")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning pool wins microseconds on an idle machine and starves everything else on a busy one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class of its own per fault, all straight under Exception
        raise ConfigError(f"graph {path}: {error}") from error
