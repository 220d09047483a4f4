"""A deployment graph in PyTorch, as a `Session`."""

from typing import Any

import numpy as np
import torch
from torch import nn

from lowpass.export.runtimes.session import Images


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
