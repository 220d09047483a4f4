"""What a run has won: the JSON object that scripts read, and the table that people read."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from lowpass.benchmarks.latency.compare import Benchmark
from lowpass.benchmarks.latency.timing import Latency
from lowpass.pipeline.run.metrics import Figures, Metrics


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelResult(_Frozen):
    """One model. What was not measured is None; a runtime that cannot run here is None, too."""

    top1: float | None
    macs: int
    parameters: int
    bytes: int
    runtimes: dict[str, dict[int, Latency] | None] | None


class Result(_Frozen):
    """The answer of `demo`, `compress`, `finetune`, `evaluate` and `benchmark`."""

    run: str
    dense: ModelResult
    slim: ModelResult
    efficiency: dict[str, dict[int, float]] | None


def summarise(directory: Path, metrics: Metrics, measured: Benchmark | None = None) -> Result:
    """Put a run's metrics and, where there is one, its benchmark together."""

    def one(model: str, figures: Figures) -> ModelResult:
        runtimes: dict[str, dict[int, Latency] | None] | None = None
        if measured is not None:
            runtimes = {
                name: None if result.not_measured else {b: getattr(c, model) for b, c in result.batches.items()}
                for name, result in measured.runtimes.items()
            }
        return ModelResult(**figures.model_dump(), runtimes=runtimes)

    efficiency = None
    if measured is not None:
        efficiency = {
            name: {batch: one.efficiency for batch, one in result.batches.items()}
            for name, result in measured.runtimes.items()
        }
    return Result(
        run=str(directory), dense=one("dense", metrics.dense), slim=one("slim", metrics.slim), efficiency=efficiency
    )


def as_table(result: Result) -> Table:
    """Dense beside slim, one row a figure."""
    dense, slim = result.dense, result.slim
    table = Table("", "dense", "slim", "slim against dense", title=result.run)
    for column in table.columns[1:]:
        column.justify = "right"
    if dense.top1 is None or slim.top1 is None:
        table.add_row("top-1", *("-" if m.top1 is None else f"{m.top1:.2f} %" for m in (dense, slim)), "-")
    else:
        table.add_row("top-1", f"{dense.top1:.2f} %", f"{slim.top1:.2f} %", f"{slim.top1 - dense.top1:+.2f} points")
    for name, field, unit, scale in (
        ("MACs", "macs", "M", 1e6),
        ("parameters", "parameters", "M", 1e6),
        ("weights file", "bytes", "MB", 1e6),
    ):
        before, after = getattr(dense, field), getattr(slim, field)
        table.add_row(
            name, f"{before / scale:.2f} {unit}", f"{after / scale:.2f} {unit}", f"{100 * after / before - 100:+.1f} %"
        )
    for runtime, batches in (dense.runtimes or {}).items():
        slim_batches = (slim.runtimes or {}).get(runtime)
        if batches is None or slim_batches is None:
            table.add_row(runtime, "not measured", "not measured", "-", style="dim")
            continue
        for batch, before in batches.items():
            after = slim_batches[batch]
            efficiency = (result.efficiency or {})[runtime][batch]
            table.add_section()
            table.add_row(
                f"{runtime}, batch {batch}",
                f"{before.p50_ms:.2f} ms",
                f"{after.p50_ms:.2f} ms",
                f"{efficiency * dense.macs / slim.macs:.2f}x the speed",
            )
            table.add_row(
                "",
                f"{before.images_per_s:.0f} img/s",
                f"{after.images_per_s:.0f} img/s",
                f"efficiency {efficiency:.2f}",
            )
    return table
