"""One `Session` over every runtime: load images, run (this is what gets timed), read the logits."""

from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from export.deploy import deployable
from export.to_onnx import DTYPES, Precision, current_onnx, weights_path
from export.to_tensorrt import FLAVOURS, Flavour, current_plan, installed_flavours, load_engine
from pipeline.errors import InputError, RunError
from pipeline.slim import SlimViT

RuntimeName = Literal["pytorch", "onnxruntime", "onnxruntime-cuda"] | Flavour
RUNTIMES: tuple[RuntimeName, ...] = ("pytorch", "onnxruntime", "onnxruntime-cuda", *FLAVOURS)
Images = NDArray[np.float32]


class Session(Protocol):
    """A model ready to run."""

    def load(self, images: Images) -> None:
        """Put a batch [B, C, H, W] FP32 where the runtime reads it; not part of a latency."""

    def run(self) -> None:
        """Compute the logits of what was loaded, and wait for them."""

    def logits(self) -> Images:
        """[B, classes] FP32 of the last run."""


def missing(runtime: RuntimeName) -> str | None:
    """Why a runtime cannot run here, or None if it can."""
    if runtime in ("pytorch", "onnxruntime"):
        return None
    if runtime == "onnxruntime-cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime has no CUDA provider; pip install onnxruntime-gpu in its place"
    elif runtime not in installed_flavours():
        return f"{runtime} is not installed; pip install 'lowpass-vit[{runtime}]'"
    return None if torch.cuda.is_available() else "it needs an NVIDIA GPU to run on"


def default_precision(runtime: RuntimeName) -> Precision:
    """FP32 on a CPU, FP16 on a GPU."""
    on_gpu = runtime not in ("pytorch", "onnxruntime") or (runtime == "pytorch" and torch.cuda.is_available())
    return "fp16" if on_gpu else "fp32"


def describe_runtime(runtime: RuntimeName) -> str:
    """Version and device, for a report."""
    if runtime == "pytorch":
        return f"torch {torch.__version__}, {'cuda' if torch.cuda.is_available() else 'cpu'}"
    if runtime in ("onnxruntime", "onnxruntime-cuda"):
        return f"onnxruntime {onnxruntime.__version__}, {'cpu' if runtime == 'onnxruntime' else 'cuda'}"
    assert runtime in FLAVOURS
    return f"{runtime} {installed_flavours()[runtime]}"


def open_session(runtime: RuntimeName, directory: Path, precision: Precision, dense: bool = False) -> Session:
    """A session on a run's slim (or dense) model.

    Raises:
        InputError: the runtime is missing here, or its file is missing or stale.
        RunError: the runtime cannot load it.
    """
    reason = missing(runtime)
    if reason is not None:
        raise InputError(f"cannot run on {runtime}: {reason}")
    if runtime == "pytorch":
        return _PyTorch(SlimViT.load(directory, weights_path(directory, dense).name), precision)
    if runtime == "onnxruntime":
        return OnnxRuntime(current_onnx(directory, precision, dense).read_bytes())
    if runtime == "onnxruntime-cuda":
        return OnnxRuntime(current_onnx(directory, precision, dense).read_bytes(), cuda=True)
    plan, _ = current_plan(directory, precision, runtime, dense)
    return _TensorRT(plan, runtime)


class _PyTorch:
    """The deployment graph in eager PyTorch, on the GPU where there is one."""

    def __init__(self, model: SlimViT, precision: Precision) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = deployable(model, DTYPES[precision]).to(self.device)

    def load(self, images: Images) -> None:
        self.images = torch.from_numpy(images).to(self.device)

    @torch.inference_mode()
    def run(self) -> None:
        self.output = self.model(self.images)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def logits(self) -> Images:
        return self.output.cpu().numpy()


class OnnxRuntime:
    """An ONNX file in ONNX Runtime; input and output stay on the device."""

    def __init__(self, content: bytes, cuda: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.device = "cuda" if cuda else "cpu"
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]
        try:
            self.session = onnxruntime.InferenceSession(content, options, providers=providers)
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise RunError(f"ONNX Runtime cannot load the model: {error}") from None
        if cuda and self.session.get_providers()[0] != "CUDAExecutionProvider":
            raise RunError("ONNX Runtime fell back to the CPU; its CUDA provider does not load here")
        self.binding: Any = self.session.io_binding()

    def load(self, images: Images) -> None:
        self.binding.clear_binding_inputs()
        self.binding.bind_ortvalue_input("images", onnxruntime.OrtValue.ortvalue_from_numpy(images, self.device, 0))
        self.binding.bind_output("logits", self.device)

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()

    def logits(self) -> Images:
        output: Images = self.binding.copy_outputs_to_cpu()[0]
        return output


class _TensorRT:
    """An engine on buffers that torch owns."""

    def __init__(self, plan: Path, flavour: Flavour) -> None:
        self.engine = load_engine(plan, flavour)
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()

    def load(self, images: Images) -> None:
        self.images = torch.from_numpy(images).cuda()
        if not self.context.set_input_shape("images", tuple(images.shape)):
            raise RunError(f"the engine's batch profile does not hold a batch of {len(images)}; export with --batch")
        shape = tuple(self.context.get_tensor_shape("logits"))
        self.output = torch.empty(shape, dtype=torch.float32, device="cuda")
        self.context.set_tensor_address("images", self.images.data_ptr())
        self.context.set_tensor_address("logits", self.output.data_ptr())
        torch.cuda.synchronize()

    def run(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RunError("TensorRT could not run the engine")
        self.stream.synchronize()

    def logits(self) -> Images:
        return self.output.cpu().numpy()


def logits_of(session: Session, batch: Images) -> Images:
    """Load, run, read."""
    session.load(batch)
    session.run()
    return session.logits()
