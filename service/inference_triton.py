"""Searches whose decode loop runs on a Triton server: one gRPC round trip each, over one connection kept open.

Understanding, filters and expansion stay in the gateway, which needs no graphs. A server that is away, has no such
model or was exported from other identifiers costs the search an InferenceUnavailable, or, where a fallback decoder
is given, runs it in this process; the connection is tried again at once and recovers by itself.
"""

import logging
import re
import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from onesearch import remote
from onesearch.bundle import Bundle
from onesearch.decode import BeamConfig, BeamResult, StepFn
from onesearch.errors import ConfigError, DeadlineError, DecodeError, OneSearchError
from onesearch.live import Selection
from onesearch.remote import Answer, Call
from onesearch.runtime import Decoder
from onesearch.search import Clock, Searcher, replay
from onesearch.sequence import Prompt
from onesearch.sid import Codes
from service.inference import EmbeddedRunner, search_threads
from trie import AnyTrie, SidTrie

FALLBACK = "inference_fallback"
PROBE_SECONDS = 2.0
_SHORTEST = 1e-3
_SERVED = (remote.MODEL_VERSION, remote.PRECISION)
_ADDRESS = re.compile(r"triton://(?P<host>[^/]+:\d+)(/(?P<model>[A-Za-z0-9_.{}-]+))?")
_RECONNECT = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]
logger = logging.getLogger("onesearch.inference")


class InferenceUnavailable(OneSearchError):
    """The inference server cannot answer."""

    code = "inference-unavailable"
    status = 503


class TritonModel:
    """The search model of a bundle on a server. Thread-safe; the connection is made at the first use."""

    def __init__(self, address: str, bundle_name: str, digest: str, timeout: float) -> None:
        """address: triton://HOST:PORT[/MODEL], where {bundle} stands for the bundle's name; timeout in seconds.

        Raises ConfigError for another address.
        """
        found = _ADDRESS.fullmatch(address)
        if found is None:
            raise ConfigError(f"inference: {address!r} is not triton://HOST:PORT or triton://HOST:PORT/MODEL")
        self.host = found["host"]
        self.name = (found["model"] or remote.MODEL).replace("{bundle}", bundle_name)
        self._digest, self._timeout = digest, timeout
        self._client = grpc.InferenceServerClient(self.host, channel_args=_RECONNECT)

    def answer(self, call: Call, deadline: float) -> Answer:
        """Ask the server, which is told when the answer is of no more use: at the deadline, `time.monotonic()`.

        Raises InferenceUnavailable, also when the timeout passes before the deadline; DeadlineError; DecodeError.
        """
        types = {tensor.name: tensor.dtype for tensor in remote.inputs(call.prompt.history.shape[-1])}
        inputs = []
        for name, array in call.tensors().items():
            tensor = grpc.InferInput(name, [1, *array.shape], types[name])
            inputs.append(tensor.set_data_from_numpy(array[None]))
        wait = max(min(deadline - time.monotonic(), self._timeout), _SHORTEST)
        try:
            found = self._client.infer(self.name, inputs, client_timeout=wait, timeout=int(wait * 1e6))
        except InferenceServerException as error:
            if time.monotonic() >= deadline:
                raise DeadlineError(f"the deadline passed while {self} searched") from error
            raise self._translated(error) from error
        return Answer.parse({tensor.name: found.as_numpy(tensor.name)[0] for tensor in remote.OUTPUTS})

    def served(self) -> tuple[str, str]:
        """Version and precision of the model. Raises InferenceUnavailable when there is none of this contract."""
        try:
            config = self._client.get_model_config(self.name, client_timeout=PROBE_SECONDS).config
            ready = self._client.is_model_ready(self.name, client_timeout=PROBE_SECONDS)
        except InferenceServerException as error:
            raise self._translated(error) from error
        if not ready:
            raise InferenceUnavailable(f"{self}: is not ready")
        served = config.parameters[remote.DIGEST].string_value
        if served != self._digest:
            raise InferenceUnavailable(
                f"{self}: its contract digest is {served[:12]!r}, the bundle's is {self._digest[:12]!r}"
            )
        version, precision = (config.parameters[name].string_value for name in _SERVED)
        return version, precision

    def close(self) -> None:
        """Drop the connection."""
        self._client.close()

    def __str__(self) -> str:
        return f"model {self.name} on {self.host}"

    def _translated(self, error: InferenceServerException) -> OneSearchError:
        message = f"{self}: {error.message()}"
        return (DecodeError if remote.BROKEN in message else InferenceUnavailable)(message)


class TritonSearcher(Searcher):
    """Searches a bundle with the model of a server; fallback, if given, decodes here while that cannot answer."""

    def __init__(self, bundle: Bundle, model: TritonModel, fallback: Decoder | None = None) -> None:
        super().__init__(bundle, fallback or _NoDecoder())
        self.model, self._fallback = model, fallback
        self._latest: Delta | None = None

    def decode(
        self, prompt: Prompt, config: BeamConfig, selection: Selection | None = None, clock: Clock | None = None
    ) -> BeamResult:
        """See `Searcher.decode`."""
        clock = clock or Clock()
        try:
            with clock.stage("inference"):
                answer = self.model.answer(self._call(prompt, config, selection), clock.deadline)
        except InferenceUnavailable as error:
            if self._fallback is None:
                raise
            logger.warning("fallback", extra={"fields": {"reason": str(error)}})
            clock.degraded.append(FALLBACK)
            return super().decode(prompt, config, selection, clock)
        clock.timings["prefill"], clock.timings["decode"] = answer.timings_ms
        clock.model_version = answer.model_version
        if selection is None:
            return answer.found
        return replace(answer.found, leaves=selection.trie.index(answer.found.codes))

    def _call(self, prompt: Prompt, config: BeamConfig, selection: Selection | None) -> Call:
        """The call of a search. The server has the bundle's trie; what was added since travels along, and what was
        removed since is masked."""
        manifest = self.bundle.manifest
        if selection is None:
            return Call.of(prompt, config, manifest.digest, manifest.catalog_version)
        delta = self._delta(selection.trie)
        mask = selection.mask
        if mask is None and not delta.changed:
            return Call.of(prompt, config, manifest.digest, manifest.catalog_version)
        legal = np.ones(selection.trie.num_sids, dtype=np.bool_) if mask is None else mask.legal()
        return Call.of(prompt, config, manifest.digest, manifest.catalog_version, *delta.split(legal))

    def _delta(self, trie: AnyTrie) -> "Delta":
        """What sets a trie apart from the bundle's; remembered for the latest trie."""
        known = self._latest
        if known is None or known.trie is not trie:
            known = self._latest = Delta(self.bundle.trie, trie)
        return known


class Delta:
    """The difference of a live trie to the trie a server has, both ways. Immutable.

    Legend: S leaves of the live trie, B leaves of the base, A added SIDs.
    """

    def __init__(self, base: SidTrie, trie: AnyTrie) -> None:
        self.trie, self._base = trie, base
        self._at = np.arange(base.num_sids) if trie is base else base.index(trie.sids())
        late = np.flatnonzero(self._at < 0)
        codes = trie.sids()[late] if len(late) else np.empty((0, base.levels), dtype=np.uint16)
        order = np.lexsort(codes.T[::-1])
        self._late, self.added = late[order], codes[order]
        self.changed = trie is not base

    def split(self, legal: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], Codes, npt.NDArray[np.bool_]]:
        """From legal leaves of the live trie, bool [S]: those of the base, bool [B]; the added SIDs, uint16 [A, L];
        and which of them are legal, bool [A]."""
        in_base = np.zeros(self._base.num_sids, dtype=np.bool_)
        in_base[self._at[(self._at >= 0) & legal]] = True
        return in_base, self.added, legal[self._late]


class TritonRunner(EmbeddedRunner):
    """Waits for the server on threads: at most `concurrency` searches are under way at the same time."""

    def __init__(self, searcher: TritonSearcher, concurrency: int) -> None:
        super().__init__(searcher, search_threads(concurrency))
        self._model = searcher.model

    async def close(self) -> None:
        """See `InferenceRunner.close`."""
        await super().close()
        self._model.close()


class Probe:
    """Tells whether searches can be answered: the server has the right model, and that gives the golden answers."""

    def __init__(self, searcher: TritonSearcher) -> None:
        self._searcher, self._model = searcher, searcher.model
        self._passed = ""

    def __call__(self) -> list[str]:
        """Faults, none when all is well. Golden examples are replayed once whenever the bundle's own model comes up."""
        try:
            version, precision = self._model.served()
            bundle = self._searcher.bundle
            new = version != self._passed and version == bundle.manifest.model_version
            if new and (faults := replay(self._searcher, bundle.examples, precision)):
                return faults
            self._passed = version
        except OneSearchError as error:
            return [str(error)]
        return []


class _NoDecoder:
    def start(self, prompt: Prompt) -> StepFn:
        raise InferenceUnavailable("there is no decoder in this process")
