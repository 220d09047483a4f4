"""Activations that a search keeps between blocks: in memory, or past a budget in files that vanish with it."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Hold = Callable[[Tensor], Tensor]


def holder(needed_bytes: int, budget_bytes: int, directory: Path) -> Hold:
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
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".activations.") as file:
        file.truncate(max(1, tensor.numel() * tensor.element_size()))
        flat = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return flat.view(tensor.shape).copy_(tensor)
