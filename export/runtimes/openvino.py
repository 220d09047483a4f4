"""An ONNX file in OpenVINO, as a `Session`."""

from typing import Any

import numpy as np
import onnx

from lowpass.export.options import Precision
from lowpass.export.runtimes.session import Images, as_input
from lowpass.pipeline.base.errors import InputError, RunError


class OpenVino:
    """An ONNX file in OpenVINO on the CPU, compiled for the batch size at hand."""

    def __init__(self, content: bytes, precision: Precision) -> None:
        self.openvino = _openvino()
        self.core = self.openvino.Core()
        self.content = content
        model = onnx.load_model_from_string(content)
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.settings = {"PERFORMANCE_HINT": "LATENCY"}
        if precision != "int8":  # what INT8 leaves out runs in the widest type the CPU is fast at
            self.settings["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}[precision]
        self.shape: tuple[int, ...] | None = None
        self.request: Any = None

    def load(self, images: Images) -> None:
        """See `Session`."""
        value = as_input(images, self.metadata)
        if value.shape != self.shape:
            # What was compiled for another batch size goes first: beside it, BF16 was seen to run 12 to 20 % slower.
            self.shape = self.request = None
            try:
                model = self.core.read_model(self.content)
                model.reshape(list(value.shape))
                compiled = self.core.compile_model(model, "CPU", self.settings)
            except RuntimeError as error:
                raise RunError(f"OpenVINO cannot compile the model: {error}") from None
            self.shape, self.request = value.shape, compiled.create_infer_request()
        self.request.set_input_tensor(self.openvino.Tensor(value))

    def run(self) -> None:
        """See `Session`."""
        self.request.infer()

    def logits(self) -> Images:
        """See `Session`."""
        return np.array(self.request.get_output_tensor().data, np.float32)


def _openvino() -> Any:
    """The package.

    Raises:
        InputError: it is not installed, or does not load.
    """
    try:
        import openvino
    except ImportError as error:
        raise InputError(f"openvino is not usable here ({error}); pip install 'lowpass-vit[openvino]'") from None
    return openvino
