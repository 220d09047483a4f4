"""A target in forecast milliseconds at batch 1, where kernels are what costs time: with whole parts gone, and without.

    python -m lowpass.benchmarks.forecast.targets

The embedded digits model, to 0.6 and 0.4 of what the dense one would take on an A100 in FP16. A plan is corrected by
the kernels of the engine that TensorRT-RTX builds of it. Top-1 is that of the test split before any fine-tuning.
Nothing was measured on a GPU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.lookups import different, over_seeds, study
from lowpass.benchmarks.rows import RESULTS, Row, markdown, write_rows
from lowpass.export.forecast.target import engine_kernels, forecast_target, parse_target
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.exits import exit_codes
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.recipe import make_recipe
from lowpass.pipeline.search.search import CostTargetsOf
from lowpass.pipeline.search.shaping import make_shaping
from lowpass.pipeline.search.target import CostTarget

MODEL, RUNTIME = "digits_deit", "forecast:a100"


def rows(seeds: int, shares: list[float], runs: Path) -> Iterator[Row]:
    """What was asked and what came of it."""
    dense = SlimViT.from_timm(load_model(MODEL), token_score="cls").architecture
    target = parse_target(RUNTIME, None, 1)
    measure = forecast_target(dense, 1.0, target).measure
    assert measure is not None
    dense_ms, before = measure(dense), {"share": "", "parts": "dense", "seed": ""}
    yield Row(before, "forecast_ms", dense_ms)
    yield Row(before, "kernels", len(engine_kernels(dense, "fp16", 1)))
    for share in shares:
        for parts, sub_blocks in (("may go", True), ("stay", False)):
            for seed in range(seeds):
                of = {"share": share, "parts": parts, "seed": seed}
                asked = forecast_target(dense, float(f"{share * dense_ms:.4g}"), target)
                recipe = make_recipe(
                    model=MODEL,
                    data="digits",
                    target_latency=asked.value,
                    runtime=RUNTIME,
                    shaping=make_shaping("tensorrt", False, token_stages="auto"),
                    sub_blocks=sub_blocks,
                    seed=seed,
                )
                run = runs / f"{share:g}-{parts.replace(' ', '-')}-{seed}"
                try:
                    metrics = compress(recipe, run, resume=True, cost_targets_of=_always(asked))
                except InputError as error:
                    yield Row(of, "refused", str(error))
                    console.print(f"{of}: {error}", soft_wrap=True)
                    continue
                slim = SlimViT.load(run).architecture
                if seed == 0:
                    yield Row(before, "top1", metrics.dense.top1 or 0.0)
                yield Row(of, "forecast_ms", measure(slim))
                yield Row(of, "kernels", len(engine_kernels(slim, "fp16", 1)))
                yield Row(of, "macs_share", slim.macs() / dense.macs())
                yield Row(of, "top1", metrics.slim.top1 or 0.0)
                console.print(f"{of}: {measure(slim) / dense_ms:.3f} of dense, {metrics.slim.top1:.2f} %")


def _always(target: CostTarget) -> CostTargetsOf:
    return lambda _: [target]


def forecast_targets(results: Path) -> str:
    """The table of the documents."""
    found, lines = study(results, "forecast_targets"), []
    (dense,) = study(results, "forecast_targets", parts="dense", figure="forecast_ms")
    for share, parts in different(found, "share", "parts"):
        of = {"share": share, "parts": parts}
        if refused := [row for row in found if row["figure"] == "refused" and all(row[k] == v for k, v in of.items())]:
            lines.append([share, parts, f"refused: {refused[0]['value']}", "-", "-", "-"])
            continue
        reached = [
            float(row["value"]) / float(dense["value"])
            for row in study(results, "forecast_targets", **of, figure="forecast_ms")
        ]
        kernels = [float(row["value"]) for row in study(results, "forecast_targets", **of, figure="kernels")]
        spread = f"{min(reached):.3f} to {max(reached):.3f}" if parts != "dense" else "1"
        counted = f"{min(kernels):.0f} to {max(kernels):.0f}" if parts != "dense" else f"{kernels[0]:.0f}"
        lines.append(
            [
                share or "1",
                parts,
                spread,
                counted,
                over_seeds(found, "macs_share", **of),
                over_seeds(found, "top1", **of),
            ]
        )
    header = ["share of dense's time", "whole parts", "reached", "kernels", "share of MACs", "top-1, no training"]
    return markdown(header, lines, 2)


def main(
    seeds: Annotated[int, typer.Option(min=1, help="From 0 upwards.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    runs: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/forecast-targets"),
) -> None:
    """Targets in forecast milliseconds."""
    with exit_codes():
        found = list(rows(seeds, [0.6, 0.4], runs))
        write_rows(out / "forecast_targets.csv", found, describe(), "python -m lowpass.benchmarks.forecast.targets")


if __name__ == "__main__":
    typer.run(main)
