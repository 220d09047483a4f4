"""From a recipe to a finished run: search or apply a table, keep what was decided, measure."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import remove_parts, write_bytes
from lowpass.pipeline.base.launched import is_first
from lowpass.pipeline.base.processes import agreed, by_the_first, same_everywhere
from lowpass.pipeline.data.datasets import Batches, len_of, made_batches
from lowpass.pipeline.model.classes import CLASSES_FILE, save_classes
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.dense_check import INPUTS_FILE, Provenance, check_dense
from lowpass.pipeline.run.evaluate import best_device, measured_top1
from lowpass.pipeline.run.images import MADE_IMAGES
from lowpass.pipeline.run.inputs import MACHINE, Inputs, check_budget, claim, read_inputs
from lowpass.pipeline.run.metrics import Figures, Metrics, count_parameters, slim_figures
from lowpass.pipeline.run.recipe import RECIPE_FILE, Recipe
from lowpass.pipeline.search.activation_store import DEFAULT_BUDGET_GIB
from lowpass.pipeline.search.log import SEARCH_FILE
from lowpass.pipeline.search.search import CostTargetsOf, logged_search
from lowpass.pipeline.search.state import SearchState
from lowpass.pipeline.search.table import apply_table


def compress(
    recipe: Recipe,
    directory: Path,
    resume: bool = False,
    cost_targets_of: CostTargetsOf | None = None,
    budget_gib: float = DEFAULT_BUDGET_GIB,
    dense_top1: float | None = None,
    model: nn.Module | None = None,
    data: tuple[Any, Any] | None = None,
    check: bool = False,
) -> Metrics:
    """Search (or apply the recipe's table), remove, measure and save into `directory`. Several processes that were
    started together share the images, and the first alone writes; `directory` is one that all of them see.

    Args:
        recipe: what to do.
        directory: new or empty; with `resume` it may hold the same run, interrupted or finished.
        resume: take up the decisions already made; the outcome is that of a run that was never interrupted.
        cost_targets_of: makes the latency targets for the dense model; only a recipe with a `runtime` needs it.
        budget_gib: memory for activations, of each process; past it they are memory-mapped files in `directory`.
        dense_top1: of the dense model on the test split, where it is known; None: to be measured.
        model: the dense model, where it is in memory; None: the recipe's.
        data: the images to train and to test on, where they are in memory; None: the recipe's.
        check: refuse a dense model that is suspiciously bad, see `dense_check.py`; otherwise it is only said.

    Raises:
        InputError: some input cannot be used; nothing was decided yet, and nothing is left in `directory`, but where
            every table was found too dear only after the losses of all cuts had been measured.
        RunError: a step failed, or the processes do not find the same.
    """

    def ready() -> tuple[bool, Inputs]:
        check_budget(budget_gib)
        return claim(recipe, directory, resume), read_inputs(recipe, model, data)

    finished, inputs = agreed(ready)  # all of them, before the first writes
    same_everywhere("what is asked for", recipe.model_dump_json(exclude=set(MACHINE)))
    same_everywhere("the dense model", inputs.dense.state_dict())
    if finished:
        by_the_first(lambda: _keep_dense(inputs.dense, directory))
        return Metrics.load(directory)
    provenance = by_the_first(lambda: check_dense(inputs, go_on=not check))
    if resume and is_first():
        remove_parts(directory)  # what a kill left half-written
    with _nothing_left_if_refused(directory, resume):
        return _compress(recipe, directory, inputs, provenance, cost_targets_of, budget_gib, dense_top1)


@contextmanager
def _nothing_left_if_refused(directory: Path, resume: bool) -> Iterator[None]:
    """Take away what was written where input is refused before anything was decided, so that other input may be given
    with the same directory."""
    there = directory.exists()
    try:
        yield
    except InputError:
        if is_first() and not resume and not (directory / SEARCH_FILE).exists():
            for name in (RECIPE_FILE, DENSE_WEIGHTS_FILE, INPUTS_FILE, CLASSES_FILE):
                (directory / name).unlink(missing_ok=True)
            if not there:
                with suppress(OSError):  # it never was, or holds something of somebody else
                    directory.rmdir()
        raise


def _compress(
    recipe: Recipe,
    directory: Path,
    inputs: Inputs,
    provenance: Provenance,
    cost_targets_of: CostTargetsOf | None,
    budget_gib: float,
    dense_top1: float | None,
) -> Metrics:
    def begin() -> None:
        recipe.save(directory)
        _keep_dense(inputs.dense, directory)
        provenance.save(directory)
        if (names := _names(inputs)) is not None:
            save_classes(directory, names)

    by_the_first(begin)
    dense = inputs.dense.to(best_device())
    if dense_top1 is None:
        dense_top1 = measured_top1(dense, inputs.data, recipe.batch_size, "testing dense")
    parameters, macs = count_parameters(dense), dense.architecture.macs()
    slim = dense  # pruned in place: the dense weights are on disk
    _prune(slim, inputs, directory, cost_targets_of, budget_gib)
    same_everywhere("the slim model", slim.state_dict())
    slim_top1 = measured_top1(slim, inputs.data, recipe.batch_size, "testing slim")

    def finish() -> Metrics:
        slim.save(directory)
        metrics = Metrics(
            dense=Figures(
                top1=dense_top1, macs=macs, parameters=parameters, bytes=(directory / DENSE_WEIGHTS_FILE).stat().st_size
            ),
            slim=slim_figures(slim, slim_top1, directory),
            pruned_top1=slim_top1,
            data=None if inputs.data is None else inputs.data.name,
            test_images=None if inputs.data is None else len_of(inputs.data.test),
        )
        metrics.save(directory)
        return metrics

    return by_the_first(finish)


def _names(inputs: Inputs) -> tuple[str, ...] | None:
    """The classes in the order of the logits: the data's, or those of a model whose images name none."""
    if inputs.data is None or inputs.data.classes is not None:
        return None if inputs.data is None else inputs.data.classes
    known = inputs.origin.classes
    return known if known is not None and len(known) == inputs.data.num_classes else None


def _prune(
    slim: SlimViT, inputs: Inputs, directory: Path, cost_targets_of: CostTargetsOf | None, budget_gib: float
) -> None:
    recipe = inputs.settings
    if inputs.blocks is None:
        assert inputs.data is not None  # a recipe without a table has images
        logged_search(slim, inputs.data, recipe, directory, cost_targets_of, budget_gib)
        return
    # Noise has nothing to recover by.
    settings = recipe if inputs.data is not None else recipe.model_copy(update={"recovery": False})
    scoring = agreed(lambda: _scoring(inputs))
    apply_table(SearchState(slim, scoring, [], settings, directory, budget_gib), inputs.blocks)


def _scoring(inputs: Inputs) -> Batches:
    recipe = inputs.settings
    if inputs.data is None:
        return made_batches(inputs.dense.architecture, MADE_IMAGES, recipe.batch_size, recipe.seed)
    return inputs.data.calibration_batches(recipe.score_images, recipe.batch_size, recipe.seed, "reading images")


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
