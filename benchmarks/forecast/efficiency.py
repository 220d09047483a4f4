"""What the MACs that are saved would be worth on GPUs that are not here: a forecast, from the models' shapes.

    python -m lowpass.benchmarks.forecast.efficiency

Dense, lowpass, the shapes as published and whole parts of blocks gone, at the paper's MACs. All are of our own
deployment graph, so that what differs is what was cut, not how it was exported. Nothing of it was measured.

Which parts a search takes depends on the model. Here they are spread evenly, as many attentions and MLPs as come near
to the MACs, in the mix that is fastest in a batch of one on an A100; what is left over is taken from the widths of the
MLPs.
"""

from collections.abc import Iterator
from itertools import product
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

NEAR = 0.98  # of the MACs: less is another model
WIDTH = 64  # step of an MLP's width
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
    found["sub-blocks"] = sub_blocks(dense, found["lowpass"].macs())
    return found


def sub_blocks(dense: Architecture, macs: int) -> Architecture:
    """Whole parts gone, evenly spread, at most so many MACs."""
    target = parse_target("forecast:a100", None, 1)
    fitting = list[tuple[float, Architecture]]()
    depth = dense.dense.depth
    for attentions, mlps in product(range(1, depth + 1), repeat=2):
        slim = with_parts(dense, attentions, mlps, macs)
        if slim is not None and slim.macs() >= NEAR * macs:
            fitting.append((forecast_of("slim", work_of(slim), target).batches[1].ms, slim))
    return min(fitting, key=lambda one_: one_[0])[1]


def with_parts(dense: Architecture, attentions: int, mlps: int, macs: int) -> Architecture | None:
    """So many attentions and MLPs, the latter as wide as fits the MACs; None: not even in their least width."""
    depth, whole = dense.dense.depth, dense.blocks[0]
    # Attention from the top, which the classifier reads, and MLPs from the bottom.
    attention_in = {depth - 1 - depth * i // attentions for i in range(attentions)}
    mlp_in = {depth * i // mlps for i in range(mlps)}
    gone = {"heads": 0, "qk_dim": 0, "v_dim": 0}
    for hidden in range(whole.hidden, 0, -WIDTH):
        blocks = tuple(
            whole.model_copy(update=({} if i in attention_in else gone) | {"hidden": hidden if i in mlp_in else 0})
            for i in range(depth)
        )
        slim = dense.model_copy(update={"blocks": blocks})
        if slim.macs() <= macs:
            return slim
    return None


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
