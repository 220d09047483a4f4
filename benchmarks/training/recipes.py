"""Top-1 after fine-tuning by several recipes, on as many images each: the default against what differs in one thing.

    python -m lowpass.benchmarks.training recipes
    python -m lowpass.benchmarks.training recipes RUN RUN --epochs 2 --train-images 20000 --test-images 2000

Searched runs are taken as they are and not changed; each is a seed of its own, which draws the order of the images,
too. Without any, the embedded digits are searched, a run a seed. A recipe that was interrupted goes on.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.lookups import different, number, one, over_seeds, study
from lowpass.benchmarks.rows import RESULTS, Origin, Row, kept_rows, markdown, origin_of, write_rows
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_json
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.data.datasets import Data, len_of, subset
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.evaluate import measured_top1
from lowpass.pipeline.run.finetune import PRUNED_WEIGHTS_FILE
from lowpass.pipeline.run.images import run_data
from lowpass.pipeline.run.recipe import Recipe, make_recipe
from lowpass.pipeline.train.finetune import finetune
from lowpass.pipeline.train.settings import FinetuneSettings, finetune_settings
from lowpass.pipeline.train.state import TrainingState

# What differs from the default of the data.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "labels alone": {"distill_weight": 0.0},
    "half distilled": {"distill_weight": 0.5},
    "tokens distilled": {"token_distillation": 1.0},
    "mixed precision": {"mixed_precision": "bf16"},
}
BATCH = 64  # images, of a test
FIGURES = ("macs_share", "top1_dense", "top1_no_training", "top1_finetuned", "seconds")


def digits_run(folder: Path, target: float, seed: int) -> Path:
    """The embedded model, searched to a share of its MACs; one that is there is not searched again."""
    directory = folder / f"digits-macs{target:g}-seed{seed}"
    compress(make_recipe(model="digits_deit", data="digits", target_macs=target, seed=seed), directory, resume=True)
    return directory


def images_of(run: Path, train_images: int | None, test_images: int | None) -> Data:
    """A run's own images; so many of them, drawn the same for every run; None: all."""

    def drawn(count: int, wanted: int | None) -> list[int]:
        return sorted(torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted].tolist())

    data = run_data(run, None)
    if train_images is not None:
        data = replace(data, train=subset(data.train, drawn(len_of(data.train), train_images)))
    if test_images is not None:
        data = replace(data, test=subset(data.test, drawn(len_of(data.test), test_images)))
    return data


def measured(run: Path, variant: str, settings: FinetuneSettings, data: Data, folder: Path) -> dict[str, float]:
    """Train a copy of a run's searched model, and measure it before and after; `seconds` are of this process alone."""
    searched = PRUNED_WEIGHTS_FILE if (run / PRUNED_WEIGHTS_FILE).exists() else None
    slim = SlimViT.load(run) if searched is None else SlimViT.load(run, searched)
    dense = SlimViT.load(run, DENSE_WEIGHTS_FILE)
    share = slim.architecture.macs() / dense.architecture.macs()
    before = [measured_top1(model, data, BATCH, "testing") for model in (dense, slim)]
    state, began = TrainingState(folder), time.perf_counter()
    if not state.begun or json.loads(state.asked()) != settings.model_dump(mode="json"):
        state.begin(settings)
    trained = finetune(slim.cpu(), dense, data, settings, Recipe.load(run).seed, state)
    seconds = time.perf_counter() - began
    after = measured_top1(trained, data, BATCH, f"testing {variant}")
    state.remove()
    values = (share, *before, after, seconds)
    return {name: float(value) for name, value in zip(FIGURES, values, strict=True) if value is not None}


def compared(
    runs: Mapping[int, Path],
    variants: list[str],
    changes: dict[str, Any],
    train_images: int | None,
    test_images: int | None,
    work: Path,
    origin: Origin,
) -> Iterator[Row]:
    """All rows, recipe by recipe; what is finished is a file below `work`, and not done again."""
    for variant in variants:
        for seed, run in runs.items():
            data = images_of(run, train_images, test_images)
            settings = finetune_settings(data.name, changes | VARIANTS[variant])
            of = {"model": Recipe.load(run).model, "variant": variant, "target": Recipe.load(run).target_macs}
            of |= {"seed": seed, "epochs": settings.epochs, "images": len_of(data.train)}
            inputs = {"of": of, "test_images": len_of(data.test), "settings": settings.model_dump(mode="json")}
            place = work / f"{run.name}-{variant.replace(' ', '-')}-{settings.epochs}x{len_of(data.train)}"
            known = _read(place.with_suffix(".json"))
            if known is None or known["inputs"] != json.loads(json.dumps(inputs)):
                place.mkdir(parents=True, exist_ok=True)
                known = {"figures": measured(run, variant, settings, data, place), "origin": asdict(origin)}
                known["inputs"] = inputs
                write_json(place.with_suffix(".json"), known)
            figures = known["figures"]
            console.print(
                f"{variant}, seed {seed}: {figures['top1_no_training']:.2f} %, fine-tuned "
                f"{figures['top1_finetuned']:.2f} % (dense {figures['top1_dense']:.2f})",
                soft_wrap=True,
            )
            yield from (Row(of, name, figures[name], origin=Origin(**known["origin"])) for name in FIGURES)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def beside(before: list[Row], found: list[Row]) -> list[Row]:
    """What was measured earlier, but for what is measured anew, and that."""

    def what(row: Row) -> tuple[str, ...]:
        return *(str(value) for value in row.of.values()), row.figure

    anew = {what(row) for row in found}
    return [row for row in before if what(row) not in anew] + found


def training_recipes(results: Path) -> str:
    """The table of the documents."""
    found, lines = study(results, "training_recipes"), []
    for model, target, epochs, images, variant in different(found, "model", "target", "epochs", "images", "variant"):
        of = {"model": model, "target": target, "epochs": epochs, "images": images, "variant": variant}
        seeds = str(len({row["seed"] for row in found if all(row[key] == value for key, value in of.items())}))
        dense = number(one(found, "top1_dense", **of), "{:.2f}")
        figures = [over_seeds(found, figure, **of) for figure in ("top1_no_training", "top1_finetuned")]
        lines.append([model, target, f"{epochs} x {int(images):,}", variant, seeds, dense, *figures])
    header = ["model", "share of MACs", "epochs x images", "recipe", "seeds", "dense", "no training", "fine-tuned"]
    return markdown(header, lines, 4)


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Searched runs. [default: the digits', searched]")] = None,
    variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)}.")] = ",".join(VARIANTS),
    target: Annotated[float, typer.Option(help="Share of the digits' MACs that stays.")] = 0.35,
    seeds: Annotated[int, typer.Option(min=1, help="Of the digits' runs, from 0 upwards.")] = 5,
    epochs: Annotated[int | None, typer.Option(min=1, help="[default: what suits the data]")] = None,
    lr: Annotated[float | None, typer.Option(help="At 512 images a step. [default: what suits the data]")] = None,
    train_images: Annotated[int | None, typer.Option(min=1, help="Of an epoch. [default: all]")] = None,
    test_images: Annotated[int | None, typer.Option(min=1, help="[default: all]")] = None,
    work: Annotated[Path, typer.Option(help="Where searches and finished rows are kept.")] = Path("runs/recipes"),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Top-1 after fine-tuning, by recipe."""
    names = [name.strip() for name in variants.split(",")]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise InputError(f"there is no recipe {unknown[0]!r}; choose from {', '.join(VARIANTS)}")
    of = {Recipe.load(run).seed: run for run in runs or ()}
    if len(of) < len(runs or ()):
        raise InputError("two runs have the same seed; each counts as a seed of its own")
    of = of or {seed: digits_run(work, target, seed) for seed in range(seeds)}
    changes = {name: value for name, value in (("epochs", epochs), ("lr", lr)) if value is not None}
    machine, csv = describe(), out / "training_recipes.csv"
    words = [Path(word).name if Path(word).is_dir() else word for word in sys.argv[1:]]
    command = shlex.join(["python", "-m", "lowpass.benchmarks.training", *words])
    found = list[Row]()
    before = kept_rows(csv, {"figure": ""})  # all of them
    for row in compared(of, names, changes, train_images, test_images, work, origin_of(machine, command)):
        found.append(row)
        write_rows(csv, beside(before, found), machine, command)
    console.print(training_recipes(out), soft_wrap=True, markup=False)
