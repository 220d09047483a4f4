"""The images of a run: its own or others, to test on, to verify exports on, and to quantise by."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.data.datasets import (
    Batches,
    Data,
    Images,
    data_in_memory,
    len_of,
    load_data,
    made_batches,
    subset,
)
from lowpass.pipeline.data.folders import FolderImages
from lowpass.pipeline.model.classes import CLASSES_FILE, has_classes, load_classes
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.recipe import IN_MEMORY, Recipe

# What --data takes, or two data sets in memory (`data_in_memory`); None: the run's own.
DataSource = str | tuple[Any, Any] | None
VERIFIED_IMAGES = 1000  # at most
CALIBRATED_IMAGES, JUDGED_IMAGES, INT8_BATCH = 256, 768, 32  # at most, for INT8
MADE_IMAGES = 32  # noise, where there are no images


def run_data(directory: Path, data: DataSource) -> Data:
    """The images `data` names or is, or those of the run's recipe, made ready for its model.

    Raises:
        InputError: neither names any.
    """
    if isinstance(data, tuple):
        return data_in_memory(*data, SlimViT.load(directory).architecture)
    recipe = Recipe.load(directory)
    spec = data or recipe.data
    if spec is None or spec == IN_MEMORY:
        how = "without images" if spec is None else "with images in memory"
        raise InputError(f"{directory} was made {how}; give `evaluate`, `finetune` or `export` --data")
    return load_run_data(directory, recipe, spec)


def load_run_data(directory: Path, recipe: Recipe, spec: str) -> Data:
    """Images for a run's model, with the classes that were fixed when the run was made."""
    architecture = SlimViT.load(directory).architecture
    names = load_classes(directory, architecture.dense.num_classes) if has_classes(directory) else None
    options = recipe.data_options(names, CLASSES_FILE, exact=True).model_copy(update={"cut": False})
    return load_data(spec, architecture, recipe.seed, options)


def verification_batches(directory: Path, data: DataSource) -> tuple[Batches, bool]:
    """Test images to compare an export on, in memory, and whether they are made: a run with random weights, or one that
    was imported without images, has none."""
    recipe = Recipe.load(directory)
    if data is None and (recipe.random_weights or recipe.data is None):
        return made_batches(SlimViT.load(directory).architecture, MADE_IMAGES, recipe.batch_size, recipe.seed), True
    images = run_data(directory, data)
    chosen = subset(images.test, _verified(images.test, recipe.seed))
    return list(track(images.loader(chosen, recipe.batch_size), "reading images to verify on")), False


def image_name(directory: Path, data: DataSource, index: int) -> str:
    """What to call one of `verification_batches`: its number among the test images, and its file where it has one."""
    recipe = Recipe.load(directory)
    if data is None and (recipe.random_weights or recipe.data is None):
        return f"made image {index}"
    test = run_data(directory, data).test
    if recipe.skip_unreadable and not isinstance(test, FolderImages):
        return f"verified image {index}"  # those before it that were left out are not known any more
    own = _verified(test, recipe.seed)[index]
    return f"test image {own}" + (f" ({test.files[own][0]})" if isinstance(test, FolderImages) else "")


def _verified(test: Images, seed: int) -> list[int]:
    """Which test images exports are verified on: of all classes, which lie in order."""
    drawn = torch.randperm(len_of(test), generator=torch.Generator().manual_seed(seed))[:VERIFIED_IMAGES]
    return sorted(drawn.tolist())


def quantization_batches(
    directory: Path, data: DataSource
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Training images [B, C, H, W], normalised, not augmented, to calibrate INT8 on, and others to judge it on. A run
    with random weights has made ones to calibrate on and none to judge it on: its top-1 says nothing."""
    recipe = Recipe.load(directory)
    if recipe.random_weights and data is None:
        made = made_batches(SlimViT.load(directory).architecture, MADE_IMAGES, 8, recipe.seed + 2)
        return [images.numpy() for images, _ in made], []
    count = CALIBRATED_IMAGES + JUDGED_IMAGES
    batches = run_data(directory, data).calibration_batches(
        count, INT8_BATCH, recipe.seed + 2, "reading images to quantise by"
    )
    images = [batch.numpy() for batch, _ in batches]
    share = max(1, len(images) * CALIBRATED_IMAGES // count)
    return images[:share], images[share:] or images[:share]
