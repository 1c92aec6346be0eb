"""A Python model that runs a graph as Triton's own backends would; it becomes `model.py` of a test."""

import os
import site
import sys
from pathlib import Path

for folder in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
    sys.path.insert(0, folder)
    site.addsitedir(folder)

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        (graph,) = (Path(args["model_repository"]) / args["model_version"]).glob("model.[op][nl]*")
        self._session = onnxruntime.InferenceSession(graph.read_bytes(), providers=["CPUExecutionProvider"])
        self._inputs = [tensor.name for tensor in self._session.get_inputs()]
        self._outputs = [tensor.name for tensor in self._session.get_outputs()]

    def execute(self, requests):
        return [pb.InferenceResponse(self._run(request)) for request in requests]

    def _run(self, request):
        feeds = {n: np.from_dlpack(pb.get_input_tensor_by_name(request, n)) for n in self._inputs}
        arrays = self._session.run(self._outputs, feeds)
        return [
            pb.Tensor.from_dlpack(n, np.require(a, requirements=["C", "W"]))
            for n, a in zip(self._outputs, arrays, strict=True)
        ]
