"""Top-1 of the slim digits model against MACs, with and without recovery, before and after fine-tuning, over seeds.

    python -m benchmarks.accuracy --targets 0.5:5 --finetune lowpass:0.5:5 --out benchmarks/results/digits_accuracy

Every seed is a search and a fine-tuning of its own, with other calibration images and another order of training; the
dense model is the one that ships. About 5 minutes a run on two cores. Runs that are already there are not repeated, and
what a search finds out about the dense model is taken from another target's run of the same seed.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict
from scipy.stats import t

from benchmarks.machine import Machine, describe
from benchmarks.plots import plot_accuracy
from pipeline.architecture import Architecture
from pipeline.files import write_json, write_text
from pipeline.progress import console
from pipeline.recipe import Recipe, make_recipe
from pipeline.run import SEARCH_FILE, Metrics, compress, finetune_run
from pipeline.shaping import AS_PUBLISHED, SHAPINGS
from pipeline.slim import SlimViT

# Shapes, and whether what reads removed channels is refitted.
COMPARED = {
    "lowpass": (SHAPINGS["tensorrt"], True),
    "no-recovery": (SHAPINGS["tensorrt"], False),
    "full-score": (SHAPINGS["tensorrt"].model_copy(update={"token_score": "full"}), True),
    "as-published": (AS_PUBLISHED, True),
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SeedResult(_Frozen):
    """One seed of one variant at one target; top-1 in percent, MACs as a share of the dense model's. `finetuned_top1`
    is None where it was not asked for."""

    variant: str
    target: float
    seed: int
    macs: float
    dense_top1: float
    pruned_top1: float
    finetuned_top1: float | None
    blocks: int
    blocks_dropping_tokens: int
    blocks_losing_channels: int


class Spread(_Frozen):
    """Over the seeds: mean, sample standard deviation and half of the 95% interval of the mean (Student's t)."""

    mean: float
    deviation: float
    half_interval: float


class Summary(_Frozen):
    """All seeds of one variant at one target."""

    variant: str
    target: float
    seeds: int
    finetuned_seeds: int
    pruned_top1: Spread
    finetuned_top1: Spread | None  # None: of fewer than two


class Accuracy(_Frozen):
    """Everything there is."""

    command: str
    seconds: float
    machine: Machine
    seeds: tuple[SeedResult, ...]
    summaries: tuple[Summary, ...]


def one_seed(directory: Path, variant: str, target_macs: float, seed: int, finetune: bool) -> SeedResult:
    """Search and fine-tune in `directory`, or take up what is there."""
    shaping, recovery = COMPARED[variant]
    recipe = make_recipe(
        model="digits_deit", data="digits", target_macs=target_macs, shaping=shaping, recovery=recovery, seed=seed
    )
    _share_curves(directory, recipe)
    metrics = compress(recipe, directory, resume=True)
    if finetune and not metrics.finetuned_epochs:
        metrics = finetune_run(directory, None, {}, None)
    return _result(variant, target_macs, seed, metrics, SlimViT.load(directory).architecture)


def _share_curves(directory: Path, recipe: Recipe) -> None:
    """Begin a run with the loss curves of the dense model from a run that differs only in its target."""
    for log in sorted(directory.parent.glob(f"*/{SEARCH_FILE}")):
        same = Recipe.load(log.parent).model_copy(update={"target_macs": recipe.target_macs}) == recipe
        if same and not directory.exists():
            lines = log.read_text().splitlines(keepends=True)
            recipe.save(directory)
            write_text(directory / SEARCH_FILE, lines[0] + "".join(line for line in lines[1:] if '"curve"' in line))


def _result(variant: str, target: float, seed: int, metrics: Metrics, architecture: Architecture) -> SeedResult:
    blocks, whole = architecture.blocks, architecture.dense.blocks()[0]
    assert metrics.dense.top1 is not None and metrics.slim.top1 is not None and metrics.pruned_top1 is not None
    return SeedResult(
        variant=variant,
        target=target,
        seed=seed,
        macs=metrics.slim.macs / metrics.dense.macs,
        dense_top1=metrics.dense.top1,
        pruned_top1=metrics.pruned_top1,
        finetuned_top1=metrics.slim.top1 if metrics.finetuned_epochs else None,
        blocks=len(blocks),
        blocks_dropping_tokens=sum(b.keep < architecture.tokens_in(i) for i, b in enumerate(blocks)),
        blocks_losing_channels=sum(b.model_copy(update={"keep": whole.keep}) != whole for b in blocks),
    )


def as_markdown(done: Accuracy) -> str:
    """The tables, with what they were measured by."""
    lines = [
        "# digits: top-1 after search and after fine-tuning",
        "",
        f"`{done.command}`, {done.seconds / 60:.1f} minutes on {done.machine.cpu}, {done.machine.cores} cores; "
        + ", ".join(f"{name} {version}" for name, version in done.machine.packages.items()),
        "",
        "Mean ± sample standard deviation over the seeds (± half of the 95% interval of the mean).",
        "",
        "| variant | MACs asked for | seeds | pruned, no training | fine-tuned | of these seeds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for summary in done.summaries:
        lines.append(
            f"| {summary.variant} | {summary.target:g} | {summary.seeds} | {_text(summary.pruned_top1)} "
            f"| {'-' if summary.finetuned_top1 is None else _text(summary.finetuned_top1)} "
            f"| {summary.finetuned_seeds} |"
        )
    lines += [
        "",
        "| variant | MACs asked for | seed | MACs | dense | pruned | fine-tuned | drop tokens | lost channels |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in done.seeds:
        finetuned = "-" if one.finetuned_top1 is None else f"{one.finetuned_top1:.2f}"
        lines.append(
            f"| {one.variant} | {one.target:g} | {one.seed} | {one.macs:.4f} | {one.dense_top1:.2f} "
            f"| {one.pruned_top1:.2f} | {finetuned} | {one.blocks_dropping_tokens} of {one.blocks} "
            f"| {one.blocks_losing_channels} of {one.blocks} |"
        )
    return "\n".join(lines) + "\n"


def _text(spread: Spread) -> str:
    return f"{spread.mean:.2f} ± {spread.deviation:.2f} (± {spread.half_interval:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Of two values or more."""
    deviation = stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
    return Spread(mean=mean(values), deviation=deviation, half_interval=half)


def summarise(seeds: Sequence[SeedResult]) -> tuple[Summary, ...]:
    """One summary a variant and target, in the order they came."""
    groups: dict[tuple[str, float], list[SeedResult]] = {}
    for one in seeds:
        groups.setdefault((one.variant, one.target), []).append(one)
    summaries = []
    for (variant, target), group in groups.items():
        finetuned = [one.finetuned_top1 for one in group if one.finetuned_top1 is not None]
        summaries.append(
            Summary(
                variant=variant,
                target=target,
                seeds=len(group),
                finetuned_seeds=len(finetuned),
                pruned_top1=spread([one.pruned_top1 for one in group]),
                finetuned_top1=spread(finetuned) if len(finetuned) > 1 else None,
            )
        )
    return tuple(summaries)


def main(
    out: Annotated[Path, typer.Option(help="Where OUT.json, OUT.md and OUT.png go.")],
    targets: Annotated[
        str, typer.Option(metavar="SHARE:SEEDS,...", help="Shares of the dense MACs that stay, with how many seeds.")
    ] = "0.5:5",
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(COMPARED)}; separated by commas.")] = "lowpass",
    finetune: Annotated[
        str, typer.Option(metavar="VARIANT:SHARE:SEEDS,...", help="Whose runs are fine-tuned, too.")
    ] = "lowpass:0.5:5",
    runs: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/accuracy"),
) -> None:
    began = time.monotonic()
    names = variants.split(",")
    if unknown := set(names) - COMPARED.keys():
        raise typer.BadParameter(f"there is no variant {', '.join(unknown)}; choose from {', '.join(COMPARED)}")
    tuned = {
        (variant, float(share), seed)
        for variant, share, seeds in (entry.split(":") for entry in finetune.split(",") if entry)
        for seed in range(int(seeds))
    }
    results = []
    for entry in targets.split(","):
        share, _, seeds = entry.partition(":")
        for name in names:
            for seed in range(int(seeds or 5)):
                target = float(share)
                directory = runs / f"macs{target:g}-{name}-seed{seed}"
                results.append(one_seed(directory, name, target, seed, (name, target, seed) in tuned))
                console.print(str(results[-1]), soft_wrap=True)
    done = Accuracy(
        command=shlex.join(["python", "-m", "benchmarks.accuracy", *sys.argv[1:]]),
        seconds=time.monotonic() - began,
        machine=describe(),
        seeds=tuple(results),
        summaries=summarise(results),
    )
    write_json(out.with_suffix(".json"), done.model_dump(mode="json"))
    write_text(out.with_suffix(".md"), as_markdown(done))
    plot_accuracy(done, out.with_suffix(".png"))
    print(as_markdown(done))


if __name__ == "__main__":
    typer.run(main)
