"""An ONNX file in OpenVINO, as a `Session`."""

from functools import cache
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
                core = _core()
                model = core.read_model(self.content)
                model.reshape(list(value.shape))
                compiled = core.compile_model(model, "CPU", self.settings)
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


@cache
def _core() -> Any:
    """One core for as long as the process lives.

    The CPU plugin of each core gives the thread an alternate signal stack and takes it away again when the core goes,
    as if the last to come were the first to go (`SigAltStackSetup` in its plugin.cpp; seen in OpenVINO 2026.4.1). When
    it is not, the thread is left with a stack that is no longer mapped, and the next signal that Python handles there,
    such as SIGCHLD once a DataLoader has had workers, ends the process with SIGSEGV and no word.
    """
    return _openvino().Core()


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
