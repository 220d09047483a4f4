"""Everything a run begins with, read and checked before anything is written."""

import math
from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.data.datasets import Data, data_in_memory, load_data
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.recovery import HELD_OUT_EVERY
from lowpass.pipeline.model.architecture import check_blocks, read_blocks
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.metrics import METRICS_FILE
from lowpass.pipeline.run.recipe import RECIPE_FILE, Recipe
from lowpass.pipeline.search.cascade import check_target


@dataclass(frozen=True)
class Inputs:
    """A recipe with what it names. `blocks` is the table to apply; None: search."""

    recipe: Recipe
    dense: SlimViT
    data: Data | None
    blocks: tuple[BlockShape, ...] | None


def read_inputs(recipe: Recipe, model: nn.Module | None = None, in_memory: tuple[Any, Any] | None = None) -> Inputs:
    """Read and check every input.

    Args:
        recipe: what to do.
        model: the dense model, where it is in memory; None: the recipe's.
        in_memory: the images to train and to test on, where they are in memory; None: the recipe's.

    Raises:
        InputError: the first that cannot be used.
    """
    if model is None:
        model = load_model(recipe.model, recipe.weights, recipe.random_weights, recipe.seed)
    dense = SlimViT.from_timm(
        model,
        recipe.token_cutoff,
        recipe.energy_norm,
        recipe.shaping.token_score,
        recipe.token_criterion,
        recipe.seed if recipe.token_criterion == "random" else 0,
    )
    architecture = dense.architecture
    if architecture.dense.differential and not recipe.shaping.whole_heads:
        raise InputError(
            f"{architecture.dense.name} has differential attention, whose heads go whole or not at all: leave out "
            "--thin-heads and --as-published"
        )
    blocks = None
    if recipe.architecture is not None:
        blocks = read_blocks(recipe.architecture)
        try:
            check_blocks(blocks, architecture.dense)
        except InputError as error:
            raise InputError(f"{recipe.architecture} does not fit: {error}") from None
    elif recipe.target_macs is not None:
        check_target(architecture, recipe.target_macs, recipe.shaping, recipe.prune)
    data = None
    if in_memory is not None:
        data = data_in_memory(*in_memory, architecture)
    elif recipe.data:
        data = load_data(recipe.data, architecture, recipe.seed)
    if data is not None:
        _check_recovery(recipe, data)
    return Inputs(recipe, dense, data, blocks)


def _check_recovery(recipe: Recipe, data: Data) -> None:
    scored = min(recipe.score_images, len(cast(Sized, data.calibration)))
    if recipe.recovery and scored < HELD_OUT_EVERY:
        raise InputError(
            f"{scored} images to score by (--score-images {recipe.score_images}) are too few for recovery, which is "
            f"judged on every {HELD_OUT_EVERY}th of them: give {HELD_OUT_EVERY} or more, or --no-recovery"
        )


def check_budget(budget_gib: float) -> None:
    """Refuse a memory budget that is none.

    Raises:
        InputError: it is negative or not a number.
    """
    if not (math.isfinite(budget_gib) and budget_gib >= 0):
        raise InputError(f"--memory-budget takes GiB, 0 or more, not {budget_gib:g}")


def claim(recipe: Recipe, directory: Path, resume: bool) -> bool:
    """Whether the run in `directory` is already finished; nothing is written.

    Raises:
        InputError: the directory holds something else.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file; --out takes a directory")
    if not directory.exists() or not any(directory.iterdir()):
        return False
    if not (directory / RECIPE_FILE).exists():
        raise InputError(f"{directory} is not empty and holds no run; give another --out")
    if not resume:
        raise InputError(f"{directory} already holds a run; give another --out, or --resume to go on with it")
    before, now = Recipe.load(directory).model_dump(), recipe.model_dump()
    for field, value in now.items():
        if before[field] != value:
            raise InputError(
                f"{directory} was started with {field} = {before[field]}, now it is {value}; give another --out"
            )
    return (directory / METRICS_FILE).exists()
