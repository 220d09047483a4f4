"""What the recipes' trainings on ImageNet would take on several GPUs: arithmetic with one measured part.

    python -m lowpass.benchmarks.training arithmetic

Known: MACs of the models (a training step is three forwards of the student and one of the teacher), the GPUs' peaks by
their makers' word, the number and the bytes of ImageNet's images. Measured here: how many JPEGs a second one core reads
and augments as the training does. Assumed, and said so in the table: `UTILISATION` of the peak, cores beside a GPU, and
prices. Nothing of it was run on a GPU.
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.lookups import number, one, study
from lowpass.benchmarks.rows import RESULTS, Row, markdown, write_rows
from lowpass.benchmarks.serving.pictures import make_pictures
from lowpass.export.forecast.gpus import GPUS
from lowpass.pipeline.data.datasets import load_data
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.inputs import dense_model
from lowpass.pipeline.run.recipe import Recipe, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINED = ("deit_tiny", "deit_small", "deit_base", "deit_base_to_2.6g", "deit_base_to_1.2g")
IMAGES, BYTES = 1_281_167, 138e9  # of ImageNet's training split (ILSVRC 2012)
GPUS_TOGETHER = 8
UTILISATION = 0.35  # of the peak, over a whole training in BF16
CORES_A_GPU = 8
DOLLARS = {"a100": 2.0, "h100": 3.0}  # an hour of one
TEACHER_MACS = {"regnety_160.deit_in1k": 15.96e9}  # by timm's results table, at 224 pixels
TURNS, SECONDS = 5, 4.0


@dataclass(frozen=True)
class Training:
    """One recipe's: images it sees, and MACs of a step's image."""

    name: str
    images: int
    macs: float

    @classmethod
    def of(cls, name: str) -> "Training":
        """By its recipe."""
        recipe = read_recipe(RECIPES / f"{name}_imagenet.yaml", data="imagenet")
        assert recipe.finetune is not None and recipe.target_macs is not None
        dense = _dense_macs(recipe)
        teacher = dense if recipe.finetune.teacher is None else TEACHER_MACS[recipe.finetune.teacher]
        return cls(name, recipe.finetune.epochs * IMAGES, 3 * recipe.target_macs * dense + teacher)


def _dense_macs(recipe: Recipe) -> int:
    return SlimViT.from_timm(dense_model(recipe.model_copy(update={"random_weights": True}))).architecture.macs()


def read_rates() -> list[float]:
    """Images a second that one core reads and augments, turn by turn."""
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            for label in ("a", "b"):
                (Path(folder) / split / label).mkdir(parents=True)
                make_pictures(Path(folder) / split / label)
        small = read_recipe(RECIPES / "deit_small_imagenet.yaml", data="imagenet")
        dense = dense_model(small.model_copy(update={"random_weights": True}))
        architecture = SlimViT.from_timm(dense).architecture
        of_two = architecture.dense.model_copy(update={"num_classes": 2})
        data = load_data(folder, architecture.model_copy(update={"dense": of_two}))
        torch.set_num_threads(1)
        return [_rate(data.train_loader(8)) for _ in range(TURNS)]


def _rate(loader: object) -> float:
    began, seen = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        for _, labels in loader:  # type: ignore[attr-defined]
            seen += len(labels)
    return seen / (time.perf_counter() - began)


def rows(rates: list[float]) -> Iterator[Row]:
    """Each recipe on each GPU."""
    a_core = median(rates)
    yield Row({"what": "read and augmented by a core"}, "images_per_s", a_core, min(rates), max(rates))
    for name in TRAINED:
        training = Training.of(name)
        for gpu, dollars in DOLLARS.items():
            seconds = 2 * training.macs * training.images / (GPUS_TOGETHER * UTILISATION * GPUS[gpu].peak("bf16"))
            images_per_s = training.images / seconds
            cores = images_per_s / a_core
            held_up = max(1.0, cores / (GPUS_TOGETHER * CORES_A_GPU))  # where reading is what saturates first
            of = {"what": "training", "recipe": name, "gpu": gpu, "gpus": GPUS_TOGETHER}
            yield Row(of, "gmacs_an_image", training.macs / 1e9)
            yield Row(of, "hours", seconds / 3600)
            yield Row(of, "images_per_s", images_per_s)
            yield Row(of, "mb_per_s", images_per_s * BYTES / IMAGES / 1e6)
            yield Row(of, "cores_to_read", cores)
            yield Row(of, "hours_with_its_cores", held_up * seconds / 3600)
            yield Row(of, "dollars", held_up * seconds / 3600 * GPUS_TOGETHER * dollars)


def training_arithmetic(results: Path) -> str:
    """The table of the documents."""
    found = study(results, "training_arithmetic")
    lines = []
    for name in TRAINED:
        for gpu in DOLLARS:
            of = {"recipe": name, "gpu": gpu}
            forms = {
                "gmacs_an_image": "{:.1f}",
                "hours": "{:.0f}",
                "images_per_s": "{:,.0f}",
                "mb_per_s": "{:,.0f}",
                "cores_to_read": "{:.0f}",
                "hours_with_its_cores": "{:.0f}",
                "dollars": "{:,.0f}",
            }
            cells = [number(one(found, figure, **of), form) for figure, form in forms.items()]
            lines.append([name, f"{GPUS_TOGETHER} x {gpu}", *cells])
    header = ["recipe", "GPUs", "GMACs an image", "hours", "images/s", "MB/s", "cores that read so fast"]
    return markdown([*header, f"hours with {CORES_A_GPU} cores a GPU", "dollars"], lines, 2)


def main(out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS) -> None:
    """Hours, data rates and prices of the recipes' trainings: arithmetic, marked as such."""
    command = shlex.join(["python", "-m", "lowpass.benchmarks.training", *sys.argv[1:]])
    write_rows(out / "training_arithmetic.csv", list(rows(read_rates())), describe(), command)
