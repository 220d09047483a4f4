"""Top-1 of slim models at matched MACs, before and after fine-tuning, over seeds: the method against its rivals.

    python -m lowpass.benchmarks.accuracy study criteria --out benchmarks/results/accuracy_criteria
    python -m lowpass.benchmarks.accuracy study criteria --variants taylor --targets 0.55 --seeds 1
    python -m lowpass.benchmarks.accuracy study criteria --model deit_tiny_patch16_224 --weights F --data imagenet/

What is compared is in `studies.py`; `noise.py` is the study of noisy images. Every seed has a
search and a fine-tuning of its own, with other calibration images and another order of training; the model is the same.
Runs that are already there are not repeated, and what a search finds out about the dense model is taken from another
run where that is the same.
"""

import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer

from lowpass.benchmarks.accuracy.plots import plot_accuracy
from lowpass.benchmarks.accuracy.shared_curves import share_curves
from lowpass.benchmarks.accuracy.studies import STUDIES, Study, Variant
from lowpass.benchmarks.accuracy.table import Accuracy, SeedResult, as_markdown, rows, summarise
from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.rows import write_rows
from lowpass.pipeline.base.allocator import keep_freed_memory
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import ARCHITECTURE_FILE, SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.finetune import finetune_run
from lowpass.pipeline.run.metrics import METRICS_FILE, Metrics
from lowpass.pipeline.run.recipe import Recipe, make_recipe

Source = dict[str, object]  # the dense model and the data


def one_seed(
    root: Path, study: Study, variant: Variant, target: float, seed: int, source: Source, finetune: bool
) -> SeedResult:
    """Search and fine-tune in a directory of its own below `root`, or take up what is there."""
    directory = directory_of(root, variant, target, seed)
    settings = {**source, **study.recipe, **variant.recipe, "seed": seed}
    if variant.amounts_of is None:
        recipe = make_recipe(**settings, target_macs=target)
        share_curves(directory, recipe)
    else:
        reference = study.variant(variant.amounts_of)
        table = directory_of(root, reference, target, seed) / ARCHITECTURE_FILE
        if not table.exists():
            one_seed(root, study, reference, target, seed, source, finetune=False)
        recipe = make_recipe(**settings, architecture=table)
    metrics = compress(recipe, directory, resume=True, dense_top1=_known_top1(root, source, seed))
    if finetune and not metrics.finetuned_epochs:
        metrics = finetune_run(directory, None, {} if study.epochs is None else {"epochs": study.epochs}, None)
    return _result(variant, target, seed, metrics, SlimViT.load(directory).architecture)


def _known_top1(root: Path, source: Source, seed: int) -> float | None:
    """Of the dense model on the test split, from any finished run of the same: the seed draws what is held out of a
    folder without a split."""
    for file in root.glob(f"*-seed{seed}/{METRICS_FILE}"):
        recipe = Recipe.load(file.parent)
        if all(getattr(recipe, name) == value for name, value in source.items()):
            return Metrics.load(file.parent).dense.top1
    return None


def directory_of(root: Path, variant: Variant, target: float, seed: int) -> Path:
    """Where a run is."""
    return root / f"{variant.name.replace(' ', '_')}-macs{target:g}-seed{seed}"


def _result(variant: Variant, target: float, seed: int, metrics: Metrics, architecture: Architecture) -> SeedResult:
    blocks, whole = architecture.blocks, architecture.dense.blocks()[0]
    assert metrics.dense.top1 is not None and metrics.slim.top1 is not None and metrics.pruned_top1 is not None
    return SeedResult(
        group=variant.group,
        variant=variant.name,
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


Task = tuple[Path, Study, Variant, Sequence[float], int, Source, bool]


def _all_targets(task: Task) -> list[SeedResult]:
    """One variant and seed: a worker's task, so that what a search finds out is found once."""
    root, study, variant, targets, seed, source, finetune = task
    return [one_seed(root, study, variant, target, seed, source, finetune) for target in targets]


def _quietly() -> None:
    """Workers share the cores, and the terminal belongs to their parent."""
    torch.set_num_threads(1)
    keep_freed_memory()
    console.quiet = True


def waves(study: Study, variants: Iterable[Variant]) -> list[list[Variant]]:
    """Variants in the order in which they can use what others found: parts alone, then both, then their amounts."""
    order: list[list[Variant]] = [[], [], []]
    for variant in variants:
        alone = "prune" in variant.recipe
        order[2 if variant.amounts_of else 0 if alone else 1].append(variant)
    return [wave for wave in order if wave]


def run_study(
    root: Path,
    study: Study,
    variants: Sequence[Variant],
    targets: Sequence[float],
    seeds: int,
    finetuned_seeds: int,
    source: Source,
    jobs: int,
) -> list[SeedResult]:
    """All results, variant by variant, `jobs` at a time."""
    results: list[SeedResult] = []
    with ProcessPoolExecutor(jobs, get_context("spawn"), _quietly) as pool:
        for wave in waves(study, variants):
            tasks: list[Task] = [
                (root, study, variant, targets, seed, source, seed < finetuned_seeds)
                for variant in wave
                for seed in range(seeds)
            ]
            for done in pool.map(_all_targets, tasks):
                for one in done:
                    console.print(
                        f"{one.variant} at {one.target:g}, seed {one.seed}: {one.pruned_top1:.2f} %"
                        + ("" if one.finetuned_top1 is None else f", fine-tuned {one.finetuned_top1:.2f} %"),
                        soft_wrap=True,
                    )
                results.extend(done)
    place = {variant.name: index for index, variant in enumerate(variants)}
    return sorted(results, key=lambda one: (place[one.variant], -one.target, one.seed))


def main(
    study: Annotated[str, typer.Argument(help=f"One of {', '.join(STUDIES)}.")],
    out: Annotated[Path | None, typer.Option(help="Where OUT.csv and OUT.png go.")] = None,
    variants: Annotated[str, typer.Option(help="Some of the study's, separated by commas. [default: all]")] = "",
    targets: Annotated[str, typer.Option(help="Shares of the dense MACs that stay. [default: the study's]")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="From 0 upwards.")] = 5,
    finetuned_seeds: Annotated[int | None, typer.Option(min=0, help="Of them fine-tuned. [default: all]")] = None,
    model: Annotated[str, typer.Option(help="timm name of the dense model.")] = "digits_deit",
    weights: Annotated[Path | None, typer.Option(help="Its checkpoint.")] = None,
    data: Annotated[str, typer.Option(help="As of `lowpass compress`.")] = "digits",
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = torch.get_num_threads(),
    runs: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/accuracy"),
) -> None:
    began = time.monotonic()
    if study not in STUDIES:
        raise typer.BadParameter(f"there is no study {study}; choose from {', '.join(STUDIES)}")
    compared = STUDIES[study]
    names = variants.split(",") if variants else [variant.name for variant in compared.variants]
    if unknown := set(names) - {variant.name for variant in compared.variants}:
        known = ", ".join(variant.name for variant in compared.variants)
        raise typer.BadParameter(f"there is no variant {', '.join(unknown)}; choose from {known}")
    results = run_study(
        runs,
        compared,
        [compared.variant(name) for name in names],
        [float(share) for share in targets.split(",")] if targets else compared.targets,
        seeds,
        seeds if finetuned_seeds is None else finetuned_seeds,
        {"model": model, "weights": weights, "data": data},
        jobs,
    )
    done = Accuracy(
        title=f"{model} on {data}: {compared.title}",
        command=shlex.join(["python", "-m", "lowpass.benchmarks.accuracy", *sys.argv[1:]]),
        seconds=time.monotonic() - began,
        machine=describe(),
        epochs=compared.epochs,
        seeds=tuple(results),
        summaries=summarise(results),
    )
    if out is not None:
        write_rows(out.with_suffix(".csv"), rows(done), done.machine, done.command)
        plot_accuracy(done, out.with_suffix(".png"))
    print(as_markdown(done))
