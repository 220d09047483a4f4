"""A run directory from start to end: validate everything, search or apply a table, keep what was decided, measure.

recipe.yaml          what was asked for                architecture.json   the table of five numbers per block
search.jsonl         one line a decision               slim.safetensors    the slim model (fine-tuned, once it is)
dense.safetensors    the model it came from            metrics.json        top-1, MACs, parameters, bytes
"""

from collections.abc import Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch.utils.data import Subset

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import remove_parts, write_bytes
from lowpass.pipeline.base.progress import console, track
from lowpass.pipeline.checkpoints.dense import DIGITS_MODEL, DIGITS_WEIGHTS, load_dense
from lowpass.pipeline.data.datasets import Batches, Data, load_data, made_batches
from lowpass.pipeline.model.architecture import BlockShape, check_blocks, first_problem, read_blocks
from lowpass.pipeline.model.slim import DENSE_WEIGHTS_FILE, WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.estimate import Forecast, forecast
from lowpass.pipeline.run.metrics import METRICS_FILE, Figures, Metrics, count_parameters, slim_figures
from lowpass.pipeline.run.recipe import RECIPE_FILE, FinetuneSettings, Recipe
from lowpass.pipeline.search.cascade import check_target
from lowpass.pipeline.search.log import logged_search
from lowpass.pipeline.search.order import chooser
from lowpass.pipeline.search.search import GoalOf
from lowpass.pipeline.search.state import DEFAULT_BUDGET_GIB, Standing
from lowpass.pipeline.train.evaluate import top1
from lowpass.pipeline.train.finetune import finetune

VERIFIED_IMAGES = 1000  # at most
CALIBRATED_IMAGES, JUDGED_IMAGES, INT8_BATCH = 256, 768, 32  # at most, for INT8
MADE_IMAGES = 32  # scored where there is no data; a random model has no channels worth more careful choosing


@dataclass(frozen=True)
class _Plan:
    """A recipe whose every input has been read and found sound; nothing has been written."""

    recipe: Recipe
    dense: SlimViT
    data: Data | None
    blocks: tuple[BlockShape, ...] | None  # the table to apply; None: search


def compress(
    recipe: Recipe,
    directory: Path,
    resume: bool = False,
    goal_of: GoalOf | None = None,
    budget_gib: float = DEFAULT_BUDGET_GIB,
    dense_top1: float | None = None,
) -> Metrics:
    """Search (or apply the recipe's table), remove, measure and save into `directory`.

    Args:
        recipe: what to do.
        directory: new or empty; with `resume` it may hold the same run, interrupted or finished.
        resume: take up the decisions already made; the outcome is that of a run that was never interrupted.
        goal_of: makes a latency target's goal for the dense model; only a recipe with `target_latency` needs it.
        budget_gib: memory for activations; past it they are memory-mapped files in `directory`.
        dense_top1: of the dense model on the test split, where it is known; None: to be measured.

    Raises:
        InputError: some input cannot be used, found before anything is written.
    """
    finished = _claim(recipe, directory, resume)
    plan = _plan(recipe)
    if resume:
        remove_parts(directory)  # what a kill left half-written
    recipe.save(directory)
    _keep_dense(plan.dense, directory)
    if finished:
        return Metrics.load(directory)
    device = best_device()
    dense = plan.dense.to(device)
    if dense_top1 is None:
        dense_top1 = _measure(dense, plan.data, recipe.batch_size, "testing dense")
    parameters, macs = count_parameters(dense), dense.architecture.macs()
    slim = dense  # pruned in place: the dense weights are on disk
    if plan.blocks is None:
        assert plan.data is not None
        logged_search(slim, plan.data, recipe, directory, goal_of, budget_gib)
    else:
        # Noise has nothing to recover by.
        settings = recipe if plan.data is not None else recipe.model_copy(update={"recovery": False})
        apply_table(slim, plan.blocks, Standing(slim, _scoring(plan), [], settings, directory, budget_gib))
    slim_top1 = _measure(slim, plan.data, recipe.batch_size, "testing slim")
    slim.save(directory)
    metrics = Metrics(
        dense=Figures(
            top1=dense_top1, macs=macs, parameters=parameters, bytes=(directory / DENSE_WEIGHTS_FILE).stat().st_size
        ),
        slim=slim_figures(slim, slim_top1, directory),
        pruned_top1=slim_top1,
    )
    metrics.save(directory)
    return metrics


def dry_run(recipe: Recipe, directory: Path, resume: bool, epochs: int | None) -> Forecast:
    """Check a recipe as `compress` would, and say what it would take; nothing is written.

    Weights may be missing: what it takes does not hang on them.

    Args:
        recipe: what to do.
        directory: where.
        resume: take up what is in `directory`.
        epochs: of fine-tuning, in place of the recipe's.

    Raises:
        InputError: some input cannot be used.
    """
    _claim(recipe, directory, resume)
    weights = "random" if recipe.random_weights else recipe.weights
    if recipe.model == DIGITS_MODEL and weights is None:
        weights = DIGITS_WEIGHTS.name
    plan = _plan(recipe.model_copy(update={"random_weights": True}) if weights is None else recipe)
    data = plan.data
    train, test = (0, 0) if data is None else (len(cast(Sized, part)) for part in (data.train, data.test))
    changes = {} if epochs is None else {"epochs": epochs}
    settings = finetune_settings(recipe.data or "", changes, recipe.finetune)
    found = None if weights is None else str(weights)
    return forecast(recipe, plan.dense.architecture, plan.blocks, train, test, settings, found)


def finetune_run(directory: Path, data: str | None, changes: dict[str, Any], seed: int | None) -> Metrics:
    """Distil the dense model into the slim one and save it in its place. A run imported without its dense model is
    trained on the labels alone.

    Args:
        directory: a run.
        data: None for the run's own.
        changes: settings that differ from the recipe's, or else from those that suit the data.
        seed: None for the run's own.

    Raises:
        InputError: a setting is out of range, or the data does not fit.
        RunError: training diverged; the run is as it was.
    """
    recipe, metrics = Recipe.load(directory), Metrics.load(directory)
    slim, dense = SlimViT.load(directory), None
    if has_dense(directory):
        dense = SlimViT.load(directory, DENSE_WEIGHTS_FILE)
    elif changes.get("distill_weight"):
        raise InputError(f"{directory} has no dense model to distil; import it again with --dense CHECKPOINT")
    else:
        console.print("no dense model to distil: training on the labels alone")
        changes = changes | {"distill_weight": 0.0}
    seed = recipe.seed if seed is None else seed
    images = run_data(directory, data)
    settings = finetune_settings(images.name, changes, recipe.finetune)
    slim = finetune(slim, dense, images, settings, seed).to(best_device())
    accuracy = _measure(slim, images, recipe.batch_size, "testing slim")
    slim.save(directory)
    metrics = metrics.model_copy(
        update={
            "slim": slim_figures(slim, accuracy, directory),
            "finetuned_epochs": metrics.finetuned_epochs + settings.epochs,
        }
    )
    metrics.save(directory)
    return metrics


def evaluate_run(directory: Path, data: str | None) -> Metrics:
    """Measure top-1 of a run's slim model, and of its dense one if it has that, on the test split of `data` (None: the
    run's own). Nothing is written: the images may be others than the run's."""
    recipe, metrics, images = Recipe.load(directory), Metrics.load(directory), run_data(directory, data)
    measured = {}
    for field, file in (("dense", DENSE_WEIGHTS_FILE), ("slim", WEIGHTS_FILE)):
        if field == "dense" and not has_dense(directory):
            continue
        model = SlimViT.load(directory, file).to(best_device())
        accuracy = _measure(model, images, recipe.batch_size, f"testing {field}")
        measured[field] = getattr(metrics, field).model_copy(update={"top1": accuracy})
    return metrics.model_copy(update=measured)


def run_data(directory: Path, data: str | None) -> Data:
    """The images `data` names, or those of the run's recipe, made ready for its model.

    Raises:
        InputError: neither names any.
    """
    recipe = Recipe.load(directory)
    spec = data or recipe.data
    if spec is None:
        raise InputError(f"{directory} was made without images; give `evaluate`, `finetune` or `export` --data")
    return load_data(spec, SlimViT.load(directory).architecture, recipe.seed)


def has_dense(directory: Path) -> bool:
    """Whether a run holds the dense model's weights: one imported without them does not."""
    return (directory / DENSE_WEIGHTS_FILE).exists()


def finetune_settings(data: str, changes: dict[str, Any], given: FinetuneSettings | None = None) -> FinetuneSettings:
    """A recipe's settings, or else those that suit a data set, with changes.

    Raises:
        InputError: one of them is out of range.
    """
    defaults = given or (FinetuneSettings.for_digits() if data == "digits" else FinetuneSettings())
    try:
        return FinetuneSettings.model_validate(defaults.model_dump() | changes)
    except ValidationError as error:
        raise InputError(f"fine-tuning: {first_problem(error)}") from None


def verification_batches(directory: Path, data: str | None) -> tuple[Batches, bool]:
    """Test images to compare an export on, in memory, and whether they are made: a run with random weights, or one that
    was imported without images, has none."""
    recipe = Recipe.load(directory)
    if data is None and (recipe.random_weights or recipe.data is None):
        return made_batches(SlimViT.load(directory).architecture, MADE_IMAGES, recipe.batch_size, recipe.seed), True
    images = run_data(directory, data)
    chosen = Subset(images.test, range(min(VERIFIED_IMAGES, len(cast(Sized, images.test)))))
    return list(track(images.loader(chosen, recipe.batch_size), "reading images to verify on")), False


def quantization_batches(
    directory: Path, data: str | None
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


def apply_table(slim: SlimViT, blocks: tuple[BlockShape, ...], standing: Standing) -> None:
    """Cut `slim` down to a given table, bottom-up, keeping the channels that the recipe's criterion likes best."""
    choose = chooser(standing, blocks)
    for index, shape in enumerate(track(blocks, "cutting blocks")):
        slim.set_keep(index, shape.keep)
        choice = choose(index)
        if choice is not None:
            slim.vit.blocks[index], _ = standing.cut(choice)
        standing.ascend()


def best_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _claim(recipe: Recipe, directory: Path, resume: bool) -> bool:
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


def _plan(recipe: Recipe) -> _Plan:
    """Read and check every input.

    Raises:
        InputError: the first that cannot be used.
    """
    model = load_dense(recipe.model, recipe.weights, recipe.random_weights, recipe.seed)
    dense = SlimViT.from_timm(
        model,
        recipe.token_cutoff,
        recipe.energy_norm,
        recipe.shaping.token_score,
        recipe.token_criterion,
        recipe.seed if recipe.token_criterion == "random" else 0,
    )
    architecture = dense.architecture
    blocks = None
    if recipe.architecture is not None:
        blocks = read_blocks(recipe.architecture)
        try:
            check_blocks(blocks, architecture.dense)
        except InputError as error:
            raise InputError(f"{recipe.architecture} does not fit: {error}") from None
    elif recipe.target_macs is not None:
        check_target(architecture, recipe.target_macs, recipe.shaping, recipe.prune)
    data = load_data(recipe.data, architecture, recipe.seed) if recipe.data else None
    return _Plan(recipe, dense, data, blocks)


def _keep_dense(dense: SlimViT, directory: Path) -> None:
    """Save the dense model, or make sure that it is the one an interrupted run began with.

    Raises:
        InputError: it is another.
    """
    path, content = directory / DENSE_WEIGHTS_FILE, dense.serialised()
    if not path.exists():
        write_bytes(path, content)
    elif path.read_bytes() != content:
        raise InputError(f"{directory} was started from other dense weights; give another --out")


def _scoring(plan: _Plan) -> Batches:
    recipe = plan.recipe
    if plan.data is None:
        return made_batches(plan.dense.architecture, MADE_IMAGES, recipe.batch_size, recipe.seed)
    return plan.data.calibration_batches(recipe.score_images, recipe.batch_size, recipe.seed, "reading images")


def _measure(model: SlimViT, data: Data | None, batch_size: int, description: str) -> float | None:
    return None if data is None else top1(model, data.loader(data.test, batch_size), description)
