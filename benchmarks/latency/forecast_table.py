"""A latency table of a GPU that is not here: the forecast of what a measured one holds, at the same points."""

from lowpass.benchmarks.latency.parts import grids
from lowpass.export.forecast.forecast import Target
from lowpass.export.forecast.target import ForecastCosts
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.search.latency_table import LatencyTable


def forecast_table(architecture: Architecture, target: Target, runtime: str) -> LatencyTable:
    """What `compress --target-latency` plans by where `runtime` is a forecast.

    Args:
        architecture: of the dense model, with its token score; its blocks do not matter.
        target: where.
        runtime: how the user called it.
    """
    dense, costs = architecture.dense, ForecastCosts(architecture, target)
    whole, prefix = dense.blocks()[0], dense.num_prefix_tokens
    tokens, heads, hidden = grids(dense)
    shapes = [whole.model_copy(update={"heads": count}) for count in heads]
    outermost = (shapes[0], shapes[-1])
    (batch,) = target.batches
    return LatencyTable(
        dense=dense,
        runtime=runtime,
        precision=target.precision,
        batch=batch,
        token_score=architecture.token_score,
        token_criterion=architecture.token_criterion,
        machine={"gpu": f"{target.gpu.name}: a forecast, not measured", "runtime": target.engine},
        ends_ms=costs.ends(),
        tokens=tuple(tokens),
        rows=tuple(count * (whole.qk_dim + whole.v_dim) for count in heads),
        hidden=tuple(hidden),
        attention_ms=tuple(tuple(costs.attention(n, shape, last=False) for shape in shapes) for n in tokens),
        mlp_ms=tuple(tuple(costs.mlp(n, size, last=False) for size in hidden) for n in tokens),
        selection_ms=tuple(costs.selection(n - prefix, last=False) for n in tokens),
        last_ms=tuple(
            tuple(costs.attention(n, shape, last=True) + costs.mlp(n, whole.hidden, last=True) for shape in outermost)
            for n in tokens
        ),
    )
