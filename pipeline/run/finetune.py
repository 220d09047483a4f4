"""A run's slim model, fine-tuned in its place."""

from pathlib import Path
from typing import Any

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.dense import has_dense
from lowpass.pipeline.run.evaluate import measured_top1
from lowpass.pipeline.run.images import DataSource, run_data
from lowpass.pipeline.run.metrics import Metrics, slim_figures
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.train.finetune import finetune
from lowpass.pipeline.train.settings import finetune_settings


def finetune_run(directory: Path, data: DataSource, changes: dict[str, Any], seed: int | None) -> Metrics:
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
        logger.info("no dense model to distil: training on the labels alone")
        changes = changes | {"distill_weight": 0.0}
    seed = recipe.seed if seed is None else seed
    images = run_data(directory, data)
    settings = finetune_settings(images.name, changes, recipe.finetune)
    before: dict[str, Any] = {}
    if metrics.data not in (None, images.name):
        # Figures that stand side by side are measured on the same images.
        logger.info("testing on %s from here on: the run's figures were of %s", images.name, metrics.data)
        dense_top1 = measured_top1(dense, images, recipe.batch_size, "testing dense")
        before = {
            "dense": metrics.dense.model_copy(update={"top1": dense_top1}),
            "pruned_top1": measured_top1(slim, images, recipe.batch_size, "testing slim before"),
        }
    slim = finetune(slim, dense, images, settings, seed)
    accuracy = measured_top1(slim, images, recipe.batch_size, "testing slim")
    slim.save(directory)
    metrics = metrics.model_copy(
        update=before
        | {
            "data": images.name,
            "slim": slim_figures(slim, accuracy, directory),
            "finetuned_epochs": metrics.finetuned_epochs + settings.epochs,
        }
    )
    metrics.save(directory)
    return metrics
