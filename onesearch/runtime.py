"""In-process decoding with ONNX Runtime, and the bookkeeping every decoder shares. Knows no torch.

Legend: K beams, P beams of the previous step, t steps taken, S prompt tokens, H codes of a level.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from onesearch.decode import StepFn
from onesearch.errors import ConfigError
from onesearch.sequence import Prompt
from onesearch.sid import LEVELS, Codes, SidVocab

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Precision = Literal["fp32", "int8"]
State = TypeVar("State")


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


class OnnxDecoder:
    """Runs the exported graphs of a bundle on the CPU; state stays inside ONNX Runtime between steps.

    graphs holds prefill.onnx and step.onnx (fp32) or step.int8.onnx (int8). threads is the number of cores one
    request may use. Raises ConfigError when a graph is missing or cannot be read.
    """

    def __init__(
        self, graphs: Path, vocab: SidVocab, bos: int, threads: int, precision: Precision = "fp32"
    ) -> None:
        if precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise ConfigError(f"precision: {precision!r} is unknown, expected one of {known}")
        self._vocab, self._bos = vocab, bos
        self._prefill = _session(graphs / "prefill.onnx", threads)
        self._step = _session(graphs / step_file(precision), threads)
        self._context = [output.name for output in self._prefill.get_outputs()]
        states = [i for i in self._step.get_inputs() if i.name.startswith("state_")]
        self._states = [i.name for i in states]
        self._width = int(states[0].shape[-1])

    def start(self, prompt: Prompt) -> StepFn:
        """Read one prompt; the result scores the next level of its beams."""
        ids = prompt.ids[None]
        inputs = _values({"ids": ids, "mask": np.ones_like(ids), "history": prompt.history[None]})
        outputs = self._prefill.run_with_ort_values(self._context, inputs)
        context = dict(zip(self._context, outputs, strict=True))

        def run(tokens: Ids, parents: Ids, head: Ids, state: list[Any]) -> tuple[Logits, list[Any]]:
            feeds = _values({"tokens": tokens, "parents": parents, "head": head})
            feeds |= context | dict(zip(self._states, state, strict=True))
            logits, *grown = self._step.run_with_ort_values(None, feeds)
            return logits.numpy(), grown

        empty = np.empty((0, 1, self._width), dtype=np.float32)
        return BeamSteps(run, list(_values(dict.fromkeys(self._states, empty)).values()), self._vocab, self._bos)


def step_file(precision: Precision) -> str:
    """File name of the step graph of a precision; the prefill graph has only one."""
    return "step.onnx" if precision == "fp32" else f"step.{precision}.onnx"


def _values(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    import onnxruntime

    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning pool wins microseconds on an idle machine and starves everything else on a busy one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class of its own per fault, all straight under Exception
        raise ConfigError(f"graph {path}: {error}") from error
