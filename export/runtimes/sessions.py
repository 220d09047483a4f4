"""`Session`: a model ready to run, in PyTorch, ONNX Runtime or OpenVINO."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from lowpass.export.graph.pixels import to_pixels
from lowpass.export.options import Precision
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.model.architecture import Preprocessing

Images = NDArray[np.float32]


class Session(Protocol):
    """A model ready to run."""

    def load(self, images: Images) -> None:
        """Put a batch [B, C, H, W] FP32 (normalised) where the runtime reads it; not part of a latency."""

    def run(self) -> None:
        """Compute the logits of what was loaded, and wait for them."""

    def logits(self) -> Images:
        """[B, classes] FP32 of the last run."""


def logits_of(session: Session, batch: Images) -> Images:
    """Load, run, read."""
    session.load(batch)
    session.run()
    return session.logits()


def as_input(images: Images, metadata: Mapping[str, str]) -> NDArray[Any]:
    """Normalised images as the exported file takes them: as they are, or pixels [B, H, W, C] uint8."""
    if metadata.get("input") == "uint8":
        return to_pixels(images, Preprocessing.model_validate_json(metadata["preprocessing"]))
    return np.ascontiguousarray(images)


class PyTorch:
    """A deployment graph in PyTorch, eager or compiled, on the GPU where there is one."""

    def __init__(self, module: nn.Module, compiled: bool = False) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module = module.to(self.device)
        # On a GPU, CUDA graphs take the launches away; a shape is compiled when it first runs.
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self.model: Any = torch.compile(module, dynamic=False, mode=mode) if compiled else module

    def load(self, images: Images) -> None:
        """See `Session`."""
        self.images = torch.from_numpy(images).to(self.device)

    @torch.inference_mode()
    def run(self) -> None:
        """See `Session`."""
        self.output = self.model(self.images)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def logits(self) -> Images:
        """See `Session`."""
        return np.asarray(self.output.cpu().numpy(), np.float32)


class OnnxRuntime:
    """An ONNX file in ONNX Runtime; input and output stay on the device."""

    def __init__(self, content: bytes, provider: str = "CPU", options: Mapping[str, str] | None = None) -> None:
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


class OpenVino:
    """An ONNX file in OpenVINO on the CPU, compiled for the batch size at hand."""

    def __init__(self, content: bytes, precision: Precision) -> None:
        try:
            import openvino
        except ImportError as error:
            raise InputError(f"openvino is not usable here ({error}); pip install 'lowpass-vit[openvino]'") from None
        self.openvino: Any = openvino
        self.core = openvino.Core()
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


def widened(content: bytes) -> bytes:
    """A BF16 file with every tensor FP32 and the weights as BF16 left them: for runtimes without BF16."""
    model = onnx.load_model_from_string(content)
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))]
    for tensor in tensors:
        if tensor.data_type == narrow:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == narrow:
                attribute.i = wide
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    return model.SerializeToString()
