"""The dense model beside a run's slim one, or what stands in for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import ARCHITECTURE_FILE, DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.recipe import Recipe


def has_dense(directory: Path) -> bool:
    """Whether a run holds the dense model's weights: one imported without them does not."""
    return (directory / DENSE_WEIGHTS_FILE).exists()


def untrained_dense(architecture: Architecture) -> SlimViT:
    """The dense model of an architecture with random weights, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SlimViT(architecture.model_copy(update={"blocks": architecture.dense.blocks()})).eval()


@contextmanager
def dense_run(directory: Path) -> Iterator[Path]:
    """A run that holds the dense weights of the run in `directory`: that run itself, or where it has none a temporary
    one with random weights, which take as long."""
    if has_dense(directory):
        yield directory
        return
    logger.info("%s has no dense weights: dense is timed with random ones", directory)
    dense = untrained_dense(SlimViT.load(directory).architecture)
    with TemporaryDirectory() as folder:
        stand_in = Path(folder)
        Recipe(
            model=dense.architecture.dense.name, random_weights=True, architecture=directory / ARCHITECTURE_FILE
        ).save(stand_in)
        dense.save(stand_in)
        dense.save(stand_in, DENSE_WEIGHTS_FILE)
        yield stand_in
