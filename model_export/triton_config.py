"""The config.pbtxt of each model of a Triton repository, from what a version says of itself (`search.json`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from onesearch import remote
from onesearch.remote import Call, Tensor

MAX_BATCH = 8
MAX_QUEUE = 256
_ONNX_TYPES = {
    "tensor(int64)": "INT64",
    "tensor(float)": "FP32",
    "tensor(float16)": "FP16",
    "tensor(bool)": "BOOL",
}
_PLATFORMS = {"in-process": "onnxruntime_onnx", "onnxruntime": "onnxruntime_onnx", "tensorrt": "tensorrt_plan"}


def search_config(number: int, about: Mapping[str, Any], warmup: Call) -> str:
    """Configuration that serves one version of the search model.

    Searches that arrive while all instances are busy are batched; one whose time runs out in the queue is refused,
    as is one that finds MAX_QUEUE others waiting. There is no warm-up where the graphs are models of their own: a
    starting server answers no model's requests.
    """
    inputs = remote.inputs(about["history_dim"])
    queue = pb.ModelQueuePolicy(
        timeout_action=pb.ModelQueuePolicy.REJECT, allow_timeout_override=True, max_queue_size=MAX_QUEUE
    )
    config = pb.ModelConfig(
        name=remote.MODEL,
        backend="python",
        max_batch_size=MAX_BATCH,
        version_policy=_only(number),
        input=[_input(tensor, ragged=-1 in tensor.shape) for tensor in inputs],
        output=[_output(tensor) for tensor in remote.OUTPUTS],
        instance_group=[
            pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_CPU, count=about["serving"]["instances"])
        ],
        dynamic_batching=pb.ModelDynamicBatching(default_queue_policy=queue),
        model_warmup=[_warmup(number, inputs, warmup)] if about["serving"]["graphs"] == "in-process" else [],
    )
    values = {
        remote.DIGEST: about["digest"],
        remote.MODEL_VERSION: about["model_version"],
        remote.CATALOG_VERSION: about["catalog_version"],
        remote.PRECISION: about["precision"],
    }
    for name, value in values.items():
        config.parameters[name].string_value = value
    return _text(config)


def graph_config(model: str, numbers: Sequence[int], about: Mapping[str, Any]) -> str:
    """Configuration of the prefill or the step graph as a model of its own: one search a call, no batching."""
    graphs = about["serving"]["graphs"]
    kind = pb.ModelInstanceGroup.KIND_CPU if graphs == "in-process" else pb.ModelInstanceGroup.KIND_GPU
    tensors = {
        part: [Tensor(t["name"], _ONNX_TYPES[t["type"]], tuple(t["shape"])) for t in about["tensors"][model][part]]
        for part in ("inputs", "outputs")
    }
    return _text(
        pb.ModelConfig(
            name=model,
            platform=_PLATFORMS[graphs],
            version_policy=_only(*numbers),
            input=[_input(tensor) for tensor in tensors["inputs"]],
            output=[_output(tensor) for tensor in tensors["outputs"]],
            instance_group=[pb.ModelInstanceGroup(kind=kind, count=1)],
        )
    )


def served_version(config: str) -> int:
    """The version that a configuration of the search model serves. Raises ValueError when it names none."""
    try:
        policy = text_format.Parse(config, pb.ModelConfig()).version_policy
    except text_format.ParseError as error:
        raise ValueError(str(error)) from error
    if len(policy.specific.versions) != 1:
        raise ValueError("version_policy names no single version")
    return int(policy.specific.versions[0])


def _only(*numbers: int) -> pb.ModelVersionPolicy:
    return pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=numbers))


def _input(tensor: Tensor, ragged: bool = False) -> pb.ModelInput:
    return pb.ModelInput(name=tensor.name, data_type=_type(tensor), dims=tensor.shape, allow_ragged_batch=ragged)


def _output(tensor: Tensor) -> pb.ModelOutput:
    return pb.ModelOutput(name=tensor.name, data_type=_type(tensor), dims=tensor.shape)


def _warmup(number: int, inputs: Sequence[Tensor], call: Call) -> pb.ModelWarmup:
    """A recorded search; its tensors lie in files of the model's `warmup` folder."""
    arrays = call.tensors()
    return pb.ModelWarmup(
        name="recorded",
        batch_size=1,
        inputs={
            tensor.name: pb.ModelWarmup.Input(
                data_type=_type(tensor), dims=arrays[tensor.name].shape, input_data_file=f"{number}.{tensor.name}"
            )
            for tensor in inputs
        },
    )


def _type(tensor: Tensor) -> int:
    return int(pb.DataType.Value(f"TYPE_{tensor.dtype}"))


def _text(config: pb.ModelConfig) -> str:
    return str(text_format.MessageToString(config))
