"""Triton's Python backend: ONNX Runtime on a CPU. Copied into the model repository as it is, so it imports nothing of
the package. Its settings are the `parameters` of config.pbtxt."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when it is first used
import onnxruntime


class TritonPythonModel:
    """`images` [B, ...] -> `logits` [B, classes] FP32. One ONNX Runtime session an instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open model.onnx of this version; what is raised here is why the server does not load the version."""
        parameters = json.loads(args["model_config"])["parameters"]
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = int(parameters["threads"]["string_value"])
        # A thread that spins takes the core from the server and from the other instances.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """One batch of all requests at once; a request alone is not copied."""
        arrays = [pb_utils.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        images = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        (logits,) = self.session.run(["logits"], {"images": images})
        bounds = np.cumsum([len(array) for array in arrays])[:-1]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("logits", np.ascontiguousarray(part))])
            for part in np.split(logits, bounds)
        ]
