"""What a recipe's target in milliseconds, or in images a second, is planned by: a runtime here, or a forecast."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.launched import started_together
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.search.search import CostTargetsOf
from lowpass.pipeline.search.target import batches_for


def cost_targets_of(recipe: Recipe) -> CostTargetsOf | None:
    """What makes a recipe's latency targets for its dense model; None: it has none.

    Raises:
        InputError: its runtime is not here, or lacks the precision; or there is no such forecast; or several processes
            would share the machine that is measured.
    """
    if recipe.runtime is None:
        return None
    batches = dict[int, float]()
    if recipe.target_latency is not None:
        batches[recipe.latency_batch] = recipe.target_latency
    elif recipe.target_throughput is not None and recipe.latency_limit is not None:
        batches = batches_for(recipe.target_throughput, recipe.latency_limit)
    from lowpass.export.forecast.target import forecast_target, is_forecast, parse_target

    limited = partial(
        replace,
        limit=math.inf if recipe.latency_limit is None else recipe.latency_limit,
        throughput=recipe.target_throughput,
    )
    if is_forecast(recipe.runtime):
        targets = {batch: parse_target(recipe.runtime, recipe.latency_precision, batch) for batch in batches}
        first = min(batches)
        return lambda dense: [
            limited(forecast_target(dense, batches[batch], target, say=batch == first))
            for batch, target in targets.items()
        ]
    if started_together() > 1:
        raise InputError(
            f"--runtime {recipe.runtime} is measured on this machine, which {started_together()} processes share: "
            "start one alone, or plan by a forecast such as --runtime forecast:a100"
        )
    from lowpass.benchmarks.latency.target import checked_runtime, latency_target

    asked_precision: Any = recipe.latency_precision  # which it checks
    runtime, precision = checked_runtime(recipe.runtime, asked_precision)
    return lambda dense: [
        limited(latency_target(dense, ms, runtime, precision, batch)) for batch, ms in batches.items()
    ]
