"""A target in forecast milliseconds at batch 1, where kernels are what costs time: with whole parts gone, and without.

    python -m lowpass.benchmarks.forecast.targets

The embedded digits model, to 0.6 of what the dense one would take on an A100 in FP16. A plan is corrected by
the kernels of the engine that TensorRT-RTX builds of it. Top-1 is that of the test split before any fine-tuning.
Nothing was measured on a GPU. A run that is already there is not repeated.
"""

import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.lookups import different, over_seeds, study
from lowpass.benchmarks.rows import RESULTS, Row, markdown, write_rows
from lowpass.export.forecast.target import engine_kernels, forecast_target, parse_target
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.exits import exit_codes
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.recipe import make_recipe
from lowpass.pipeline.search.shaping import make_shaping

MODEL, RUNTIME = "digits_deit", "forecast:a100"


def rows(seeds: int, shares: list[float], runs: Path, jobs: int) -> Iterator[Row]:
    """What was asked and what came of it, `jobs` searches at a time."""
    dense, measure = _dense(), _measure()
    dense_ms, before = measure(dense), {"share": "", "parts": "dense", "seed": ""}
    yield Row(before, "forecast_ms", dense_ms)
    yield Row(before, "kernels", len(engine_kernels(dense, "fp16", 1)))
    tasks = [
        (runs, share, parts, seed, float(f"{share * dense_ms:.4g}"))
        for share in shares
        for parts in ("may go", "stay")
        for seed in range(seeds)
    ]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for done in pool.map(_searched, tasks):
            yield from done


def _searched(task: tuple[Path, float, str, int, float]) -> list[Row]:
    """One search, or what there is of it."""
    runs, share, parts, seed, asked_ms = task
    torch.set_num_threads(1)
    of = {"share": share, "parts": parts, "seed": seed}
    asked = forecast_target(_dense(), asked_ms, parse_target(RUNTIME, None, 1))
    recipe = make_recipe(
        model=MODEL,
        data="digits",
        target_latency=asked.value,
        runtime=RUNTIME,
        shaping=make_shaping("tensorrt", False, token_stages="auto"),
        sub_blocks=parts == "may go",
        seed=seed,
    )
    run = runs / f"{share:g}-{parts.replace(' ', '-')}-{seed}"
    try:
        metrics = compress(recipe, run, resume=True, cost_targets_of=lambda _: [asked])
    except InputError as error:
        console.print(f"{of}: {error}", soft_wrap=True)
        return [Row(of, "refused", str(error))]
    slim = SlimViT.load(run).architecture
    console.print(f"{of}: {metrics.slim.top1:.2f} %", soft_wrap=True)
    return [
        Row(of, "forecast_ms", _measure()(slim)),
        Row(of, "kernels", len(engine_kernels(slim, "fp16", 1))),
        Row(of, "macs_share", slim.macs() / metrics.dense.macs),
        Row(of, "top1_dense", metrics.dense.top1 or 0.0),
        Row(of, "top1", metrics.slim.top1 or 0.0),
    ]


def _dense() -> Architecture:
    return SlimViT.from_timm(load_model(MODEL), token_score="cls").architecture


def _measure() -> Callable[[Architecture], float]:
    measure = forecast_target(_dense(), 1.0, parse_target(RUNTIME, None, 1)).measure
    assert measure is not None
    return measure


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
    shares: Annotated[str, typer.Option(help="Of dense's time, separated by commas.")] = "0.6",
    runs: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/forecast-targets"),
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
) -> None:
    """Targets in forecast milliseconds."""
    with exit_codes():
        found = list(rows(seeds, [float(share) for share in shares.split(",")], runs, jobs))
        command = shlex.join(["python", "-m", "lowpass.benchmarks.forecast.targets", *sys.argv[1:]])
        write_rows(out / "forecast_targets.csv", found, describe(), command)


if __name__ == "__main__":
    typer.run(main)
