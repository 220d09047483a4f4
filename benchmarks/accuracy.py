"""Top-1 of the slim digits model over several seeds.

    python -m benchmarks.accuracy --shapings lowpass,as-published --seeds 5 --out benchmarks/results/digits_accuracy

Every seed is a search and a fine-tuning of its own, with other calibration images and another order of training; the
dense model is the one that ships. About 4 minutes a seed on two cores. Runs that are already there are not repeated.
"""

import shlex
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict

from benchmarks.machine import Machine, describe
from pipeline.architecture import Architecture
from pipeline.files import write_json, write_text
from pipeline.progress import console
from pipeline.recipe import make_recipe
from pipeline.run import Metrics, compress, finetune_run
from pipeline.shaping import AS_PUBLISHED, SHAPINGS
from pipeline.slim import SlimViT

COMPARED = {
    "lowpass": SHAPINGS["tensorrt"],
    "full-score": SHAPINGS["tensorrt"].model_copy(update={"token_score": "full"}),
    "as-published": AS_PUBLISHED,
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SeedResult(_Frozen):
    """One seed of one shaping; top-1 in percent, MACs as a share of the dense model's."""

    shaping: str
    seed: int
    macs: float
    dense_top1: float
    pruned_top1: float
    finetuned_top1: float
    blocks: int
    blocks_dropping_tokens: int
    blocks_losing_channels: int


class Spread(_Frozen):
    """Mean and sample standard deviation over the seeds."""

    mean: float
    deviation: float


class Summary(_Frozen):
    """All seeds of one shaping."""

    pruned_top1: Spread
    finetuned_top1: Spread


class Accuracy(_Frozen):
    """All seeds of all shapings."""

    command: str
    seconds: float
    machine: Machine
    seeds: tuple[SeedResult, ...]
    shapings: dict[str, Summary]


def one_seed(directory: Path, shaping: str, target_macs: float, seed: int) -> SeedResult:
    """Search and fine-tune in `directory`, or take up what is there."""
    recipe = make_recipe(
        model="digits_deit", data="digits", target_macs=target_macs, shaping=COMPARED[shaping], seed=seed
    )
    metrics = compress(recipe, directory, resume=True)
    if not metrics.finetuned_epochs:
        metrics = finetune_run(directory, None, {}, None)
    return _result(shaping, seed, metrics, SlimViT.load(directory).architecture)


def _result(shaping: str, seed: int, metrics: Metrics, architecture: Architecture) -> SeedResult:
    blocks, whole = architecture.blocks, architecture.dense.blocks()[0]
    assert metrics.dense.top1 is not None and metrics.slim.top1 is not None and metrics.pruned_top1 is not None
    return SeedResult(
        shaping=shaping,
        seed=seed,
        macs=metrics.slim.macs / metrics.dense.macs,
        dense_top1=metrics.dense.top1,
        pruned_top1=metrics.pruned_top1,
        finetuned_top1=metrics.slim.top1,
        blocks=len(blocks),
        blocks_dropping_tokens=sum(b.keep < architecture.tokens_in(i) for i, b in enumerate(blocks)),
        blocks_losing_channels=sum(b.model_copy(update={"keep": whole.keep}) != whole for b in blocks),
    )


def as_markdown(done: Accuracy) -> str:
    """The table, with what it was measured by."""
    lines = [
        "# digits: top-1 after search and fine-tuning",
        "",
        f"`{done.command}`, {done.seconds / 60:.1f} minutes on {done.machine.cpu}, {done.machine.cores} cores; "
        + ", ".join(f"{name} {version}" for name, version in done.machine.packages.items()),
        "",
        "| shaping | seed | MACs | dense | pruned | fine-tuned | blocks that drop tokens | blocks that lost channels |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in done.seeds:
        lines.append(
            f"| {one.shaping} | {one.seed} | {one.macs:.3f} | {one.dense_top1:.2f} | {one.pruned_top1:.2f} "
            f"| {one.finetuned_top1:.2f} | {one.blocks_dropping_tokens} of {one.blocks} "
            f"| {one.blocks_losing_channels} of {one.blocks} |"
        )
    for name, summary in done.shapings.items():
        pruned, finetuned = summary.pruned_top1, summary.finetuned_top1
        lines.append(
            f"| **{name}** | mean ± deviation | | | {pruned.mean:.2f} ± {pruned.deviation:.2f} "
            f"| {finetuned.mean:.2f} ± {finetuned.deviation:.2f} | | |"
        )
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> Spread:
    return Spread(mean=mean(values), deviation=stdev(values))


def main(
    out: Annotated[Path, typer.Option(help="Where OUT.json and OUT.md go.")],
    target_macs: Annotated[float, typer.Option(help="Share of the dense MACs that stays.")] = 0.5,
    shapings: Annotated[str, typer.Option(help=f"Of {', '.join(COMPARED)}; separated by commas.")] = "lowpass",
    seeds: Annotated[int, typer.Option(min=2, help="How many.")] = 5,
    runs: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/accuracy"),
) -> None:
    began = time.monotonic()
    results: dict[str, list[SeedResult]] = {name: [] for name in shapings.split(",")}
    if unknown := results.keys() - COMPARED.keys():
        raise typer.BadParameter(f"there is no shaping {', '.join(unknown)}; choose from {', '.join(COMPARED)}")
    for seed in range(seeds):
        for name, of_shaping in results.items():
            of_shaping.append(one_seed(runs / f"macs{target_macs:g}-{name}-seed{seed}", name, target_macs, seed))
            console.print(str(of_shaping[-1]), soft_wrap=True)

    done = Accuracy(
        command=shlex.join(["python", "-m", "benchmarks.accuracy", *sys.argv[1:]]),
        seconds=time.monotonic() - began,
        machine=describe(),
        seeds=tuple(one for of_shaping in results.values() for one in of_shaping),
        shapings={
            name: Summary(
                pruned_top1=_spread([one.pruned_top1 for one in of_shaping]),
                finetuned_top1=_spread([one.finetuned_top1 for one in of_shaping]),
            )
            for name, of_shaping in results.items()
        },
    )
    write_json(out.with_suffix(".json"), done.model_dump(mode="json"))
    write_text(out.with_suffix(".md"), as_markdown(done))
    print(as_markdown(done))


if __name__ == "__main__":
    typer.run(main)
