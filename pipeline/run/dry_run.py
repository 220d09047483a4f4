"""`--dry-run`: every input is checked as a run would, the dense model measured on a few hundred images, and nothing is
written."""

import resource
from pathlib import Path

from lowpass.pipeline.checkpoints.digits_deit import DIGITS_MODEL, DIGITS_WEIGHTS
from lowpass.pipeline.data.datasets import len_of
from lowpass.pipeline.run.dense_check import check_dense
from lowpass.pipeline.run.estimate import Estimate, estimate
from lowpass.pipeline.run.inputs import check_budget, claim, read_inputs
from lowpass.pipeline.run.measure import hours, measure
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.train.settings import finetune_settings


def dry_run(
    recipe: Recipe,
    directory: Path,
    resume: bool,
    epochs: int | None,
    budget_gib: float,
    check: bool,
    timed: bool = False,
) -> Estimate:
    """Check a recipe as `compress` would, and say what it would take.

    Weights may be missing: what it takes does not hang on them, but for the dense model's top-1.

    Args:
        recipe: what to do.
        directory: where.
        resume: take up what is in `directory`.
        epochs: of fine-tuning, in place of the recipe's.
        budget_gib: memory for activations.
        check: refuse a dense model that is suspiciously bad, see `dense_check.py`; otherwise it is only said.
        timed: time the parts for a minute, and say hours.

    Raises:
        InputError: some input cannot be used.
    """
    check_budget(budget_gib)
    claim(recipe, directory, resume)
    weights = "random" if recipe.random_weights else recipe.weights
    if recipe.model == DIGITS_MODEL and weights is None:
        weights = DIGITS_WEIGHTS.name
    inputs = read_inputs(recipe.model_copy(update={"random_weights": True}) if weights is None else recipe)
    data, provenance = inputs.data, check_dense(inputs, go_on=not check)
    train, test = (0, 0) if data is None else (len_of(part) for part in (data.train, data.test))
    changes = {} if epochs is None else {"epochs": epochs}
    settings = finetune_settings(recipe.data or "", changes, recipe.finetune)
    found = None if weights is None else str(weights)
    done = estimate(inputs.settings, inputs.dense.architecture, inputs.blocks, train, test, settings, found)
    if timed:
        rates = measure(inputs.dense, data, recipe.batch_size, settings, recipe.seed)
        macs = (done.dense_macs, done.search_macs, done.test_macs, done.finetune_macs)
        done = done.model_copy(update={"hours": hours(rates, *macs, done.finetune_images)})
    # What it took to come so far, passes of the dense model among it, beside what a search holds. What it computes with
    # comes on top: on the digits the peak was 2.1 to 2.2 times this, with a budget of 0.1 GiB 1.4 times.
    taken = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return done.model_copy(
        update={
            "checked_images": provenance.checked_images,
            "checked_top1": provenance.checked_top1,
            "least_bytes": taken + min(done.search_bytes, round(budget_gib * 2**30)),
        }
    )
