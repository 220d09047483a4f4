"""A deployment graph in PyTorch, as a `Session`: eager, compiled, or as one CUDA graph."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lowpass.export.runtimes.session import Images, Session
from lowpass.pipeline.base.errors import RunError

TorchRuntime = Literal["pytorch", "pytorch-graph", "pytorch-compile"]
TORCH: tuple[TorchRuntime, ...] = get_args(TorchRuntime)
Compute = Callable[[], Tensor]
Captured = tuple[Callable[[], None], Tensor]  # what computes again, and the tensor that it fills
Capture = Callable[[Compute], Captured]
WARM_UPS = 3  # runs before a capture: first ones load kernels and allocate, which a graph cannot hold
# Every model at every batch size is a compilation of the same `forward`. After 8 of them (torch's own limit) the rest
# would run eager, and nothing would say so.
MOST_COMPILATIONS = 4096


class PyTorch:
    """A deployment graph in PyTorch, eager or compiled, on the GPU where there is one."""

    def __init__(self, module: nn.Module, compiled: bool = False) -> None:
        self.device = _device()
        self.compiled = compiled
        module = module.to(self.device)
        # On a GPU, CUDA graphs take the launches away. Whole or not at all: a part that ran eager would go unnoticed.
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self.model: Any = torch.compile(module, dynamic=False, fullgraph=True, mode=mode) if compiled else module

    def load(self, images: Images) -> None:
        """See `Session`. A batch size is compiled when it is first loaded.

        Raises:
            RunError: it does not compile.
        """
        self.images = torch.from_numpy(images).to(self.device)
        if not self.compiled:
            return
        try:
            # Both names are those of torch 2.11 to 2.15. With `fullgraph` reaching a limit is an error.
            with torch._dynamo.config.patch(
                recompile_limit=MOST_COMPILATIONS, accumulated_recompile_limit=MOST_COMPILATIONS
            ):
                self.run()
        except Exception as error:  # compilers raise what they like: dynamo's, inductor's and triton's share no base
            raise RunError(f"torch.compile cannot run the model: {reason_of(error)}") from None

    @torch.inference_mode()
    def run(self) -> None:
        """See `Session`."""
        self.output = self.model(self.images)
        _wait(self.device)

    def logits(self) -> Images:
        """See `Session`."""
        return _read(self.output)


class PyTorchGraph:
    """A deployment graph in eager PyTorch, captured as one CUDA graph a batch size: no launches from Python, no
    compilation. Images are copied into the graph's own buffer."""

    def __init__(self, module: nn.Module, capture: Capture) -> None:
        self.device = _device()
        self.model = module.to(self.device)
        self.capture = capture
        self.images: Tensor | None = None
        self.captured: Captured | None = None

    @torch.inference_mode()
    def load(self, images: Images) -> None:
        """See `Session`. A batch size is captured when it is first loaded.

        Raises:
            RunError: it cannot be captured.
        """
        value = torch.from_numpy(images)
        if self.images is not None and self.images.shape == value.shape:
            self.images.copy_(value)
            return
        self.images = self.captured = None  # a graph holds the memory of its batch size: it goes before the next
        static = torch.empty(value.shape, device=self.device)
        static.copy_(value)
        self.captured = self.capture(lambda: self.model(static))
        self.images = static

    def run(self) -> None:
        """See `Session`."""
        assert self.captured is not None
        self.captured[0]()
        _wait(self.device)

    def logits(self) -> Images:
        """See `Session`."""
        assert self.captured is not None
        return _read(self.captured[1])


def cuda_graph(compute: Compute) -> Captured:
    """Capture what `compute` does on the GPU, after warming it up on a stream of its own, as torch's notes on CUDA
    graphs ask for.

    Raises:
        RunError: it cannot be captured, or memory runs out.
    """
    before = torch.cuda.current_stream()
    aside = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    try:
        aside.wait_stream(before)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                compute()
        before.wait_stream(aside)
        with torch.cuda.graph(graph):
            output = compute()
    except RuntimeError as error:
        # A capture that fails leaves its stream behind as the current one (torch 2.11 to 2.15).
        torch.cuda.set_stream(before)
        # What went wrong inside is hidden behind the complaint of the capture that it broke off.
        raise RunError(f"it cannot be captured as a CUDA graph: {reason_of(error.__context__ or error)}") from None
    return graph.replay, output


def torch_session(runtime: TorchRuntime, module: nn.Module, capture: Capture = cuda_graph) -> Session:
    """A session on a module from FP32 images to FP32 logits.

    Args:
        runtime: how it is run.
        module: moved to the GPU where there is one.
        capture: for `pytorch-graph`.
    """
    if runtime == "pytorch-graph":
        return PyTorchGraph(module, capture)
    return PyTorch(module, compiled=runtime == "pytorch-compile")


def reason_of(error: BaseException) -> str:
    """The kind and the first line of an error, for a table: whole texts hold the calls of a compiler."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _read(output: Tensor) -> Images:
    return np.asarray(output.cpu().numpy(), np.float32)
