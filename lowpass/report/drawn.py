"""The charts of a run."""

from collections.abc import Sequence

from lowpass.benchmarks.latency.compare import Benchmark
from lowpass.export.tensorrt.layers import Layers
from lowpass.pipeline.model.architecture import Architecture
from lowpass.report.charts import BOTH, Row, bars, columns, curves, pairs
from lowpass.report.current import Engine
from lowpass.report.plane import Chart, Kind
from lowpass.report.searched import Losses
from lowpass.report.seen import ClassTop1

CLASSES = 20  # drawn of many: those whose top-1 changed most


def blocks(architecture: Architecture) -> tuple[Chart, ...]:
    """Heads, their sizes, hidden width and tokens by block, in front of the dense model's."""
    dense, table = architecture.dense.blocks()[0], architecture.blocks
    names = {"heads": "Heads", "qk_dim": "Query/key size", "v_dim": "Value size", "hidden": "Hidden width"}
    drawn = [
        columns(name, [getattr(shape, field) for shape in table], getattr(dense, field), name.lower())
        for field, name in names.items()
    ]
    return (*drawn, columns("Image tokens passed on", [shape.keep for shape in table], dense.keep, "image tokens"))


def speed(measured: Benchmark) -> tuple[Chart, ...]:
    """Speed-up of every runtime and batch size, with the speed-up that the saved MACs would be."""
    rows = [
        Row(f"{runtime} {result.precision}, batch {batch}", one.speedup, None, f"{one.speedup:.2f}×")
        for runtime, result in measured.runtimes.items()
        for batch, one in result.batches.items()
    ]
    if not rows:
        return ()
    saved = measured.macs["dense"] / measured.macs["slim"]
    legend: list[tuple[Kind, str]] = [
        ("slim", "speed-up over dense"),
        ("other", f"dense MACs / slim MACs: {saved:.2f}"),
    ]
    return (bars("Speed-up", rows, legend, saved),)


def loss_curves(measured: Sequence[Losses]) -> tuple[Chart, ...]:
    """What cutting one part of one block alone loses."""
    drawn = [
        curves(part.title, [(f"block {block}", sorted(losses.items())) for block, losses in part.blocks], part.unit)
        for part in measured
    ]
    return tuple(chart for chart in drawn if chart is not None)


def classes(found: Sequence[ClassTop1]) -> tuple[Chart, ...]:
    """Top-1 of each class, or of those that changed most."""
    most = sorted(found, key=lambda one: -abs(one.slim - (one.slim if one.dense is None else one.dense)))[:CLASSES]
    rows = [
        Row(one.name, one.slim, one.dense, f"{one.slim:.1f} %" + ("" if one.dense is None else f" ({one.dense:.1f} %)"))
        for one in found
        if one in most
    ]
    title = "Top-1 by class" if len(rows) == len(found) else f"Top-1 of the {len(rows)} classes that changed most"
    return (pairs(title, rows),)


def kernels(built: Sequence[Engine]) -> tuple[Chart, ...]:
    """Kernels by block of each slim engine at its smallest batch, with the dense engine's of the same precision."""
    dense = {engine.precision: _by_block(engine) for engine in built if engine.dense and engine.layers}
    drawn = list[Chart]()
    for engine in built:
        if engine.dense or not engine.layers:
            continue
        before = dense.get(engine.precision, {})
        rows = []
        for block, kernels in _by_block(engine).items():
            against = f" (dense {before[block]})" if block in before else ""
            rows.append(Row(f"block {block}", kernels, before.get(block), f"{kernels}{against}"))
        legend = BOTH if before else BOTH[:1]
        drawn.append(bars(f"Kernels by block: {engine.name}, batch {_smallest(engine).batch}", rows, legend))
    return tuple(drawn)


def _smallest(engine: Engine) -> Layers:
    """The kernels for the smallest batch alone, or whatever there is."""
    assert engine.manifest is not None
    least = str(engine.manifest.profile.least)
    return next((at for at in engine.layers if at.batch == least), engine.layers[0])


def _by_block(engine: Engine) -> dict[int, int]:
    return {total.block: total.kernels for total in _smallest(engine).blocks if total.block is not None}
