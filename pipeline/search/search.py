"""How far a recipe wants to go decides how it is searched: to an allowable drop, or to a target."""

import copy
from collections.abc import Callable
from pathlib import Path

from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim import SlimViT
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.search.cascade import Log, search_to_drop
from lowpass.pipeline.search.costs import Macs
from lowpass.pipeline.search.state import DEFAULT_BUDGET_GIB, Standing
from lowpass.pipeline.search.target import Goal, check_measured_target, profile, search_to_target

GoalOf = Callable[[Architecture], Goal]


def search(
    model: SlimViT,
    scoring: Batches,
    measuring: Batches,
    recipe: Recipe,
    directory: Path,
    log: Log,
    goal_of: GoalOf | None = None,
    budget_gib: float = DEFAULT_BUDGET_GIB,
) -> None:
    """Prune `model` in place.

    Args:
        model: the dense model as a SlimViT, in evaluation mode.
        scoring: batches for LFS, recovery and the loss of a cut.
        measuring: batches for top-1.
        recipe: the goal and the criteria's settings.
        directory: where activations past the memory budget lie.
        log: decisions of an interrupted run, and where new ones go.
        goal_of: makes a latency target's goal for the dense model; only a recipe with `target_latency` needs it.
        budget_gib: memory for activations.

    Raises:
        InputError: the target is out of reach.
    """

    def standing(pruned: SlimViT) -> Standing:
        return Standing(pruned, scoring, measuring, recipe, directory, budget_gib)

    if recipe.allowable_drop is not None:
        search_to_drop(standing(model), recipe.allowable_drop, log)
        return
    dense = model.architecture
    if recipe.target_macs is not None:
        goal = Goal(recipe.target_macs * dense.macs(), Macs(dense), "MACs")
    elif goal_of is not None:
        goal = goal_of(dense)
    else:
        raise ValueError("a latency target needs a way to measure")
    if log.fresh:
        check_measured_target(goal, dense, recipe.shaping, recipe.prune)
    curves = profile(standing(copy.deepcopy(model)), log)
    search_to_target(curves, standing(model), goal, log)
