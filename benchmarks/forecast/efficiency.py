"""What the MACs that are saved would be worth on GPUs that are not here: a forecast, from the models' shapes.

    python -m lowpass.benchmarks.forecast.efficiency

Dense, lowpass and the shapes as published, at the paper's MACs. All are of our own deployment graph, so that what
differs is what was cut, not how it was exported. Nothing of it was measured.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import timm
import typer

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.lookups import different, number, one, study
from lowpass.benchmarks.rows import RESULTS, Row, markdown, write_rows
from lowpass.benchmarks.speed.candidates import MODELS, RECIPES
from lowpass.export.forecast.forecast import forecast_of
from lowpass.export.forecast.target import parse_target
from lowpass.export.forecast.work import work_of
from lowpass.pipeline.base.exits import exit_codes
from lowpass.pipeline.model.architecture import Architecture, read_blocks
from lowpass.pipeline.model.slim_vit import SlimViT

GPUS, BATCHES = ("t4", "a100", "h100"), (1, 8, 32, 128)
SHAPES = {"lowpass": "paper", "as-published": "as_published"}  # -> the recipe's name


def shapes(model: str) -> dict[str, Architecture]:
    """The dense model, and it cut down."""
    vit = timm.create_model(MODELS[model])
    dense = SlimViT.from_timm(vit, token_score="cls").architecture
    found = {"dense": dense}
    for name, recipe in SHAPES.items():
        blocks = read_blocks(RECIPES / f"{model}_{recipe}.json")
        scored = dense if name == "lowpass" else SlimViT.from_timm(vit, token_score="full").architecture
        found[name] = scored.model_copy(update={"blocks": blocks})
    return found


def rows(model: str) -> Iterator[Row]:
    """Milliseconds and kernels of each shape at each batch on each GPU, with what nine in ten forecasts are within; and
    the efficiency of what is cut."""
    found = shapes(model)
    for gpu in GPUS:
        for batch in BATCHES:
            target = parse_target(f"forecast:{gpu}", None, batch)
            made = {name: forecast_of(name, work_of(one_), target).batches[batch] for name, one_ in found.items()}
            for name, figures in made.items():
                of = {"model": model, "gpu": gpu, "batch": batch, "candidate": name}
                yield Row(of, "forecast_ms", figures.ms, figures.low_ms, figures.high_ms)
                yield Row(of, "kernels", figures.kernels)
                if name != "dense":
                    saved = found["dense"].macs() / found[name].macs()
                    yield Row(of, "efficiency", made["dense"].ms / figures.ms / saved)


def forecast_efficiency(results: Path) -> str:
    """The table of the documents."""
    found, lines = study(results, "forecast_efficiency"), []
    for model, gpu, name in different(found, "model", "gpu", "candidate"):
        if name != "dense":
            of = {"model": model, "gpu": gpu}
            counts = (one(found, "kernels", candidate=of_, batch="1", **of) for of_ in ("dense", name))
            shares = (one(found, "efficiency", candidate=name, batch=str(batch), **of) for batch in BATCHES)
            lines.append(
                [
                    model,
                    gpu,
                    name,
                    *(number(count, "{:.0f}") for count in counts),
                    *(number(s, "{:.2f}") for s in shares),
                ]
            )
    header = ["model", "GPU", "shape", "kernels, dense", "kernels", *(f"batch {batch}" for batch in BATCHES)]
    return markdown(header, lines, 3)


def main(out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS) -> None:
    """Forecasts of what is saved, on GPUs that are not here."""
    with exit_codes():
        found = [row for model in MODELS for row in rows(model)]
        write_rows(
            out / "forecast_efficiency.csv", found, describe(), "python -m lowpass.benchmarks.forecast.efficiency"
        )


if __name__ == "__main__":
    typer.run(main)
