"""Activations that a search keeps between blocks: in memory, or past a budget in files that vanish with it."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Store = Callable[[Tensor], Tensor]
DEFAULT_BUDGET_GIB = 8.0


def activation_store(needed_bytes: int, budget_bytes: int, directory: Path) -> Store:
    """How to keep tensors of `needed_bytes` in all: as they are, or memory-mapped where that exceeds the budget.

    A mapped file has no name any more once it is made: it goes with the tensor, however the process ends.

    Args:
        needed_bytes: of everything that will be held at a time.
        budget_bytes: what may be held in memory.
        directory: where mapped files lie.
    """
    return _in_memory if needed_bytes <= budget_bytes else lambda tensor: _mapped(tensor, directory)


def _in_memory(tensor: Tensor) -> Tensor:
    return tensor.cpu()


def _mapped(tensor: Tensor, directory: Path) -> Tensor:
    size = max(1, tensor.numel() * tensor.element_size())
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".activations.") as file:
        try:
            # Set aside now: a disk that is full at the first write to the map would end the process (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            error.filename = str(directory)
            raise
        flat = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return flat.view(tensor.shape).copy_(tensor)
