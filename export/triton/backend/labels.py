"""Triton's Python backend: logits to the best classes by name. Copied into the model repository as it is, so it imports
nothing of the package. How many classes is a parameter of config.pbtxt, their names are labels.txt of the version."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """`logits` [B, classes] -> `probabilities`, `labels` and `indices` [B, top], best first."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the names; what is raised here is why the server does not load the version."""
        config = json.loads(args["model_config"])
        self.top = int(config["parameters"]["top"]["string_value"])
        path = Path(args["model_repository"]) / args["model_version"] / "labels.txt"
        names = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if len(names) != int(config["input"][0]["dims"][0]):
            raise ValueError(f"{path} holds {len(names)} names, one a line; {config['input'][0]['dims'][0]} are needed")
        self.names = np.array([name.encode() for name in names], dtype=np.object_)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        logits = pb_utils.get_input_tensor_by_name(request, "logits").as_numpy().astype(np.float64)
        if not np.isfinite(logits).all():
            return pb_utils.InferenceResponse([], pb_utils.TritonError("the model's logits are not finite"))
        best = np.argsort(-logits, axis=1, kind="stable")[:, : self.top]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        outputs = {
            "probabilities": np.take_along_axis(shares, best, axis=1).astype(np.float32),
            "labels": self.names[best],
            "indices": best.astype(np.int32),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, values) for name, values in outputs.items()])
