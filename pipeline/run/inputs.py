"""Everything a run begins with, read and checked before anything is written."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.checkpoints.in_memory import check_agrees, own_copy
from lowpass.pipeline.checkpoints.load import as_timm, load_model
from lowpass.pipeline.checkpoints.origin import Choices, Origin, origin_of, set_preprocessing
from lowpass.pipeline.data.classes import read_class_names
from lowpass.pipeline.data.datasets import Data, data_in_memory, len_of, load_data
from lowpass.pipeline.data.options import DataOptions
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.recovery import HELD_OUT_EVERY
from lowpass.pipeline.model.architecture import Architecture, check_blocks, read_blocks
from lowpass.pipeline.model.readout import keep_classes
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.metrics import METRICS_FILE
from lowpass.pipeline.run.recipe import RECIPE_FILE, Recipe
from lowpass.pipeline.search.target import check_target

MACHINE = ("workers",)  # of a recipe, what may differ when an interrupted run is taken up


@dataclass(frozen=True)
class Inputs:
    """A recipe with what it names. `blocks` is the table to apply; None: search. `settings` is the recipe as it can be
    followed on these images."""

    recipe: Recipe
    settings: Recipe
    dense: SlimViT
    data: Data | None
    blocks: tuple[BlockShape, ...] | None
    origin: Origin


def read_inputs(recipe: Recipe, model: nn.Module | None = None, in_memory: tuple[Any, Any] | None = None) -> Inputs:
    """Read and check every input.

    Args:
        recipe: what to do.
        model: the dense model, where it is in memory; None: the recipe's.
        in_memory: the images to train and to test on, where they are in memory; None: the recipe's.

    Raises:
        InputError: the first that cannot be used.
    """
    own = None if model is None else own_copy(model)
    model = dense_model(recipe) if own is None else _in_memory(own, recipe)
    origin, dense = origin_of(model), as_slim(model, recipe)
    if own is not None:
        described = dense.architecture.dense
        check_agrees(own, dense, (described.in_chans, *described.img_size))
    if dense.architecture.dense.differential and not recipe.shaping.whole_heads:
        raise InputError(
            f"{dense.architecture.dense.name} has differential attention, whose heads go whole or not at all: leave "
            "out --thin-heads and --as-published"
        )
    blocks = _table(recipe, dense.architecture)
    data = None
    if in_memory is not None:
        data = data_in_memory(*in_memory, dense.architecture)
    elif recipe.data:
        data = load_data(recipe.data, dense.architecture, recipe.seed, _options(recipe, dense.architecture, origin))
        if data.rows is not None:
            keep_classes(model, data.rows)
            dense = as_slim(model, recipe)
    return Inputs(recipe, _followed(recipe, data), dense, data, blocks, origin)


def dense_model(recipe: Recipe) -> nn.Module:
    """The model that a recipe names, as a timm ViT.

    Raises:
        InputError: see `load_model`.
    """
    return load_model(recipe.model, recipe.weights, recipe.random_weights, recipe.seed, **recipe.choices())


def _in_memory(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A program's model as a timm ViT, with the preprocessing that the recipe chooses."""
    copied = as_timm(model)
    config = getattr(copied, "pretrained_cfg", None) or {}
    chosen = Choices(mean=recipe.mean, std=recipe.std, crop_pct=recipe.crop_pct, interpolation=recipe.interpolation)
    if isinstance(config, dict):
        said = config.get("preprocessing_source") or ("the model's pretrained_cfg" if "mean" in config else "a default")
        set_preprocessing(copied, said, {}, chosen)
    return copied


def as_slim(model: nn.Module, recipe: Recipe) -> SlimViT:
    """A timm ViT as a slim one with nothing removed, its tokens scored as the recipe says."""
    return SlimViT.from_timm(
        model,
        recipe.token_cutoff,
        recipe.energy_norm,
        recipe.shaping.token_score,
        recipe.token_criterion,
        recipe.seed if recipe.token_criterion == "random" else 0,
    )


def _table(recipe: Recipe, architecture: Architecture) -> tuple[BlockShape, ...] | None:
    if recipe.architecture is not None:
        blocks = read_blocks(recipe.architecture)
        try:
            check_blocks(blocks, architecture.dense)
        except InputError as error:
            raise InputError(f"{recipe.architecture} does not fit: {error}") from None
        return blocks
    if recipe.target_macs is not None:
        check_target(architecture, recipe.target_macs, recipe)
    return None


def _options(recipe: Recipe, architecture: Architecture, origin: Origin) -> DataOptions:
    """Who names the classes: the user's file, else the model's source."""
    if recipe.classes is not None:
        names = read_class_names(recipe.classes, architecture.dense.num_classes)
        return recipe.data_options(names, str(recipe.classes), exact=True)
    return recipe.data_options(origin.classes, origin.classes_from, exact=False)


def _followed(recipe: Recipe, data: Data | None) -> Recipe:
    """The recipe, with recovery off where there are too few images to judge it on."""
    if data is None:
        return recipe
    scored = min(recipe.score_images, len_of(data.calibration))
    if recipe.recovery and scored < HELD_OUT_EVERY:
        logger.info(
            "recovery is off: it is judged on every %dth of the images that score, and there are %d",
            HELD_OUT_EVERY,
            scored,
        )
        return recipe.model_copy(update={"recovery": False})
    return recipe


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
    before, now = Recipe.load(directory).model_dump(exclude=set(MACHINE)), recipe.model_dump(exclude=set(MACHINE))
    for field, value in now.items():
        if before[field] != value:
            raise InputError(
                f"{directory} was started with {field} = {before[field]}, now it is {value}; give another --out"
            )
    return (directory / METRICS_FILE).exists()
