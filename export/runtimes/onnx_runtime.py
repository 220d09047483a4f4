"""An ONNX file in ONNX Runtime, as a `Session`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime

from lowpass.export.runtimes.onnx_packages import preload
from lowpass.export.runtimes.session import Images, as_input
from lowpass.pipeline.base.errors import RunError


class OnnxRuntime:
    """An ONNX file in ONNX Runtime; input and output stay on the device."""

    def __init__(self, content: bytes, provider: str = "CPU", options: Mapping[str, str] | None = None) -> None:
        if provider != "CPU":
            preload()
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        # Threads that go on spinning after a run take the cores from whichever session runs next.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        self.device = "cpu" if provider == "CPU" else "cuda"
        wanted = f"{provider}ExecutionProvider"
        fallback = ["CPUExecutionProvider"] if provider in ("CPU", "CUDA") else ["CUDAExecutionProvider"]
        providers = [(wanted, dict(options or {})), *(name for name in fallback if name != wanted)]
        try:
            self.session = onnxruntime.InferenceSession(content, settings, providers=providers)
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise RunError(f"ONNX Runtime cannot load the model: {error}") from None
        if self.session.get_providers()[0] != wanted:
            raise RunError(f"ONNX Runtime fell back to {self.session.get_providers()[0]}: {wanted} does not load here")
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        self.binding: Any = self.session.io_binding()

    def load(self, images: Images) -> None:
        """See `Session`."""
        # On a CPU it is a view of the array, which nothing else would keep alive.
        self.images = onnxruntime.OrtValue.ortvalue_from_numpy(as_input(images, self.metadata), self.device, 0)
        self.binding.clear_binding_inputs()
        self.binding.bind_ortvalue_input("images", self.images)
        self.binding.bind_output("logits", self.device)

    def run(self) -> None:
        """See `Session`."""
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()

    def logits(self) -> Images:
        """See `Session`."""
        output: Images = self.binding.copy_outputs_to_cpu()[0]
        return output


NARROW = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16)


def widened(content: bytes) -> bytes:
    """A BF16 or FP16 file with every tensor FP32 and the weights as that precision left them: for runtimes without
    BF16, and to see what FP16 would lose."""
    model, wide = onnx.load_model_from_string(content), onnx.TensorProto.FLOAT
    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))]
    for tensor in tensors:
        if tensor.data_type in NARROW:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "output_dtype") and attribute.i in NARROW:
                attribute.i = wide
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type in NARROW:
            value.type.tensor_type.elem_type = wide
    return model.SerializeToString()
