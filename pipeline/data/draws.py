"""What augmentation draws, drawn by place: image i of epoch e is the same whoever reads it, and whenever.

So a training that goes on after a kill, in mid-epoch too, sees the images that it would have seen, whatever the number
of processes that read or train.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


@contextmanager
def drawn_by(*place: int) -> Iterator[None]:
    """Within, all three generators that transforms draw from are seeded by `place`; after it they are as before."""
    seeds = np.random.SeedSequence(place).generate_state(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class DrawnByPlace(Dataset[tuple[Tensor, int]]):
    """The images of a training split that can be had in any order, each augmented as the seed, the epoch and its place
    say."""

    def __init__(self, images: Dataset[tuple[Tensor, int]], seed: int) -> None:
        self.images, self.seed, self.epoch = images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Before each pass; processes that read get it with the data set."""
        self.epoch = epoch
        if hasattr(self.images, "epoch"):
            self.images.epoch = epoch  # digit scenes draw for themselves

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with drawn_by(self.seed, self.epoch, index):
            return self.images[index]
