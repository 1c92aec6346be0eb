"""The search model inside Triton's Python backend: the one decode loop, beside the graphs.

This file is copied into the model repository as `model.py` and runs in Triton's own Python, which needs this
project and onnxruntime installed. A version that does not reproduce its recorded answers does not load, so Triton
keeps serving the version before it.
"""

import ctypes
import json
import os
import site
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

# The embedded interpreter runs isolated and ignores PYTHONPATH; a real image has the packages installed.
for _folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
    sys.path.insert(0, _folder)
    site.addsitedir(_folder)

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb

from onesearch import remote
from onesearch.decode import StepFn, beam_search
from onesearch.errors import ConfigError, DeadlineError, DecodeError, OneSearchError
from onesearch.remote import Answer, Call
from onesearch.runtime import BeamSteps, Decoder, Ids, Logits, open_decoder
from onesearch.search import GOLDEN_TOLERANCE, score_gap
from onesearch.sequence import Prompt
from onesearch.sid import Codes, SidSpec, SidVocab
from trie import Overlay, SidTrie

KEPT_CATALOGS = 2
_KEPT_OVERLAYS = 8
_TAKEN = ctypes.c_char_p(b"used_dltensor")


class TritonPythonModel:
    """One instance of one version; `execute` runs the searches of a batch side by side."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the version's folder; whatever is raised, Triton refuses the load."""
        inputs = json.loads(args["model_config"])["input"]
        folder = Path(args["model_repository"]) / args["model_version"]
        self._about = json.loads((folder / "search.json").read_text("utf-8"))
        self._tries = Tries(folder.parent / remote.CATALOGS)
        self._decoder = _decoder(folder, self._about, int(args["model_version"]))
        self._names = [tensor["name"] for tensor in inputs]
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self._unproven = remote.read_recorded(folder / "recorded.npz")
        self._in_process = self._about["serving"]["graphs"] == "in-process"
        if self._in_process:
            self._prove()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order; a failed search fails alone.

        Where the graphs are models of their own, which cannot be asked before, the first request proves the version.
        """
        if self._unproven:
            self._prove()
        return list(self._pool.map(self._respond, requests))

    def finalize(self) -> None:
        """Let running searches finish."""
        self._pool.shutdown()

    def _respond(self, request: Any) -> Any:
        try:
            tensors = {n: np.from_dlpack(pb.get_input_tensor_by_name(request, n)) for n in self._names}
            if any(len(array) != 1 for array in tensors.values()):
                raise ConfigError("a request holds one search; the server batches requests itself")
            call = Call.parse({name: array[0] for name, array in tensors.items()})
            answer = self._search(call, request.is_cancelled)
        except LookupError as error:
            return _failed(str(error.args[0]), pb.TritonError.NOT_FOUND)
        except DeadlineError as error:
            return _failed(str(error), pb.TritonError.CANCELLED)
        except (ConfigError, ValueError) as error:
            return _failed(str(error), pb.TritonError.INVALID_ARG)
        except OneSearchError as error:
            return _failed(f"{remote.BROKEN}{error}", pb.TritonError.INTERNAL)
        return pb.InferenceResponse(_tensors({name: array[None] for name, array in answer.tensors().items()}))

    def _search(self, call: Call, abandoned: Callable[[], bool]) -> Answer:
        """Answer a call. Nothing more is started once it is abandoned: the gateway's deadline cancels its request."""
        if call.digest != self._about["digest"]:
            raise ConfigError(
                f"contract digest {call.digest[:12]!r} is not this model's, {self._about['digest'][:12]!r}: "
                "gateway and model come from different identifiers"
            )
        base = self._tries.base(call.catalog)
        trie = self._tries.overlay(call.catalog, call.added) if len(call.added) else base
        legal = call.mask(base.num_sids)
        mask = None if legal is None else trie.subset(legal)
        started = time.perf_counter()
        _check(abandoned)
        step = self._decoder.start(call.prompt)
        read = time.perf_counter()

        def attentive(codes: Codes, parents: Ids, /) -> Logits:
            _check(abandoned)
            return step(codes, parents)

        config = call.config.in_quarters() if self._in_process else call.config
        found = beam_search(attentive, trie, config, mask)
        times = ((read - started) * 1e3, (time.perf_counter() - read) * 1e3)
        return Answer(found, self._about["model_version"], times)

    def _prove(self) -> None:
        """Raises ConfigError unless the recorded calls get their recorded answers, within the golden tolerance."""
        graphs, precision = self._about["serving"]["graphs"], self._about["precision"]
        # The answers are those of the very same graphs, except where these are engines.
        faults, allowed = [], GOLDEN_TOLERANCE[precision if graphs == "tensorrt" else "fp32"]
        for number, (call, expected) in enumerate(self._unproven):
            gap = score_gap(expected.found, self._search(call, _never).found)
            if gap > allowed:
                faults.append(f"recorded call {number}: scores differ by {gap:.2g}, allowed {allowed}")
        if faults:
            raise ConfigError("; ".join([f"model {self._about['model_version']} is refused", *faults]))
        self._unproven = []


class Tries:
    """The tries that calls ask for by version, opened when first asked for; the latest KEPT_CATALOGS stay open.

    Raises LookupError for a version that was not published.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._base = lru_cache(KEPT_CATALOGS)(self._open)
        self._overlay = lru_cache(_KEPT_OVERLAYS)(self._build)

    def base(self, version: str) -> SidTrie:
        """The trie of a version."""
        return self._base(version)

    def overlay(self, version: str, added: npt.NDArray[np.uint16]) -> Overlay:
        """The trie of a version together with added SIDs uint16 [A, L]."""
        return self._overlay(version, added.tobytes())

    def _open(self, version: str) -> SidTrie:
        try:
            return SidTrie.open(self._folder / f"{version}.trie")
        except OSError as error:
            raise LookupError(f"catalog {version!r} is not on this server; publish it first") from error

    def _build(self, version: str, added: bytes) -> Overlay:
        base = self._base(version)
        codes = np.frombuffer(added, dtype=np.uint16).reshape(-1, base.levels)
        return Overlay(base, SidTrie.build(codes, base.sizes))


class ServedDecoder:
    """Runs the prefill and step models of this server, of the same version as this one.

    Beam state is handed from call to call as it comes back, on whatever device those models leave it.
    """

    def __init__(self, about: Mapping[str, Any], version: int) -> None:
        self._version, self._vocab, self._bos = version, _vocab(about), about["bos"]
        prefill, step = (about["tensors"][model] for model in (remote.PREFILL, remote.STEP))
        self._context = [tensor["name"] for tensor in prefill["outputs"]]
        self._outputs = [tensor["name"] for tensor in step["outputs"]]
        states = [tensor for tensor in step["inputs"] if tensor["name"].startswith("state_")]
        self._states = [tensor["name"] for tensor in states]
        kind = np.float16 if states[0]["type"] == "tensor(float16)" else np.float32
        self._empty = np.empty((0, 1, states[0]["shape"][-1]), dtype=kind)

    def start(self, prompt: Prompt) -> StepFn:
        """See `onesearch.runtime.Decoder`."""
        ids = prompt.ids[None]
        inputs: remote.Tensors = {"ids": ids, "mask": np.ones_like(ids), "history": prompt.history[None]}
        context = self._call(remote.PREFILL, _tensors(inputs), self._context)

        def run(tokens: Ids, parents: Ids, head: Ids, state: list[Any]) -> tuple[Logits, list[Any]]:
            inputs = _tensors({"tokens": tokens, "parents": parents, "head": head})
            logits, *grown = self._call(remote.STEP, [*inputs, *context, *state], self._outputs)
            carried = [pb.Tensor.from_dlpack(n, g) for n, g in zip(self._states, grown, strict=True)]
            return cast(Logits, np.from_dlpack(logits)), carried

        return BeamSteps(run, _tensors(dict.fromkeys(self._states, self._empty)), self._vocab, self._bos)

    def _call(self, model: str, tensors: list[Any], wanted: list[str]) -> list[Any]:
        request = pb.InferenceRequest(
            model_name=model, model_version=self._version, inputs=tensors, requested_output_names=wanted
        )
        response = request.exec()
        if response.has_error():
            raise DecodeError(f"{model}: {response.error().message()}")
        return [pb.get_output_tensor_by_name(response, name) for name in wanted]


def _decoder(folder: Path, about: Mapping[str, Any], version: int) -> Decoder:
    if about["serving"]["graphs"] != "in-process":
        return ServedDecoder(about, version)
    return open_decoder(folder / "graphs", _vocab(about), about["bos"], 1, about["serving"]["precision"])


def _vocab(about: Mapping[str, Any]) -> SidVocab:
    return SidVocab(SidSpec(tuple(about["sizes"])), about["first_id"])


def _tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
    return [_tensor(name, np.require(array, requirements=["C", "W"])) for name, array in arrays.items()]


def _tensor(name: str, array: npt.NDArray[Any]) -> Any:
    """A tensor by DLPack, because older backends misread NumPy 2 arrays in the plain constructor and `as_numpy`.

    The backend marks a capsule it has taken with a name of its own, at which NumPy complains, not the standard's.
    """
    if not array.size:
        return pb.Tensor(name, array)
    capsule = array.__dlpack__()
    tensor = pb.Tensor.from_dlpack(name, capsule)
    ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), _TAKEN)
    return tensor


def _check(abandoned: Callable[[], bool]) -> None:
    if abandoned():
        raise DeadlineError("the caller gave this search up")


def _never() -> bool:
    return False


def _failed(message: str, code: int) -> Any:
    return pb.InferenceResponse(error=pb.TritonError(message, code))
