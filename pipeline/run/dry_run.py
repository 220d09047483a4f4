"""`--dry-run`: every input is checked as a run would, and nothing is written."""

from pathlib import Path

from lowpass.pipeline.checkpoints.digits_deit import DIGITS_MODEL, DIGITS_WEIGHTS
from lowpass.pipeline.data.datasets import len_of
from lowpass.pipeline.run.estimate import Estimate, estimate
from lowpass.pipeline.run.inputs import claim, read_inputs
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.train.settings import finetune_settings


def dry_run(recipe: Recipe, directory: Path, resume: bool, epochs: int | None) -> Estimate:
    """Check a recipe as `compress` would, and say what it would take.

    Weights may be missing: what it takes does not hang on them.

    Args:
        recipe: what to do.
        directory: where.
        resume: take up what is in `directory`.
        epochs: of fine-tuning, in place of the recipe's.

    Raises:
        InputError: some input cannot be used.
    """
    claim(recipe, directory, resume)
    weights = "random" if recipe.random_weights else recipe.weights
    if recipe.model == DIGITS_MODEL and weights is None:
        weights = DIGITS_WEIGHTS.name
    inputs = read_inputs(recipe.model_copy(update={"random_weights": True}) if weights is None else recipe)
    data = inputs.data
    train, test = (0, 0) if data is None else (len_of(part) for part in (data.train, data.test))
    changes = {} if epochs is None else {"epochs": epochs}
    settings = finetune_settings(recipe.data or "", changes, recipe.finetune)
    found = None if weights is None else str(weights)
    return estimate(inputs.settings, inputs.dense.architecture, inputs.blocks, train, test, settings, found)
