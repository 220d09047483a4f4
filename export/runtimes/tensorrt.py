"""A TensorRT engine as a `Session`: our own runner on buffers that torch owns, with a CUDA graph where it captures."""

from collections.abc import Mapping

import numpy as np
import torch

from lowpass.export.runtimes.engine import Flavour, load_engine
from lowpass.export.runtimes.session import Images, as_input
from lowpass.pipeline.base.errors import RunError


class TensorRT:
    """Inputs and outputs stay on the GPU. Once warm, a run is one CUDA graph: at small batches launches cost more than
    kernels. What cannot be captured runs as it is; `captured` says which."""

    def __init__(self, plan: bytes, flavour: Flavour, metadata: Mapping[str, str]) -> None:
        self.engine = load_engine(plan, flavour)
        self.context = self.engine.create_execution_context()
        self.stream = torch.cuda.Stream()
        self.metadata = metadata
        self.captured = False

    def load(self, images: Images) -> None:
        """See `Session`."""
        self.images = torch.from_numpy(as_input(images, self.metadata)).cuda()
        self.context.set_optimization_profile_async(self._profile_for(len(images)), self.stream.cuda_stream)
        if not self.context.set_input_shape("images", tuple(self.images.shape)):
            raise RunError(f"the engine's batch profile does not hold a batch of {len(images)}; export with --batch")
        shape = tuple(self.context.get_tensor_shape("logits"))
        self.output = torch.empty(shape, dtype=torch.float32, device="cuda")
        self.context.set_tensor_address("images", self.images.data_ptr())
        self.context.set_tensor_address("logits", self.output.data_ptr())
        torch.cuda.synchronize()
        self._capture()

    def _profile_for(self, batch: int) -> int:
        """The optimisation profile made for this batch size alone, or the first, for the whole range."""
        for index in range(self.engine.num_optimization_profiles):
            least, _, most = self.engine.get_tensor_profile_shape("images", index)
            if least[0] == most[0] == batch:
                return index
        return 0

    def _capture(self) -> None:
        self.captured = False
        for _ in range(2):  # the first run at a shape compiles or allocates, which a graph cannot hold
            self._enqueue()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self._enqueue()
        except RuntimeError:
            torch.cuda.synchronize()
            return
        self.graph, self.captured = graph, True

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RunError("TensorRT could not run the engine")

    def run(self) -> None:
        """See `Session`."""
        if self.captured:
            with torch.cuda.stream(self.stream):
                self.graph.replay()
        else:
            self._enqueue()
        self.stream.synchronize()

    def logits(self) -> Images:
        """See `Session`."""
        return np.asarray(self.output.cpu().numpy(), np.float32)
