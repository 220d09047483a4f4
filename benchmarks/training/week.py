"""A training of 2,000 epochs that is killed every few, against the same one left alone.

    python -m lowpass.benchmarks.training week

The digits model cut down to very little, on 64 images: an epoch is a step, after each the whole state is saved. Kills
are SIGKILL, at random moments. What is compared are the bytes of what training leaves; memory is the process's before
it is killed, disk the run's directory then.
"""

import json
import multiprocessing
import random
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.rows import RESULTS, Row, write_rows
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.data.datasets import load_data, subset
from lowpass.pipeline.model.slim_vit import WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.compress import compress
from lowpass.pipeline.run.finetune import finetune_run
from lowpass.pipeline.run.metrics import METRICS_FILE
from lowpass.pipeline.run.recipe import make_recipe

IMAGES, TESTED = 64, 100
BLOCK = {"heads": 1, "qk_dim": 8, "v_dim": 8, "hidden": 16, "keep": 16}
LEFT = (WEIGHTS_FILE, METRICS_FILE, "pruned.safetensors", "architecture.json")
LOOK_S = 0.5


@dataclass(frozen=True)
class Sample:
    """Bytes of the process and of the run's directory, so many epochs into a training."""

    epoch: int
    memory: int
    disk: int


def make_run(folder: Path) -> Path:
    """A run whose training takes no time."""
    table = folder / "table.json"
    folder.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps({"blocks": 6 * [BLOCK]}))
    recipe = make_recipe(model="digits_deit", data="digits", architecture=table, score_images=64, recovery=False)
    compress(recipe, folder / "searched")
    return folder / "searched"


def train(run: Path, epochs: int) -> None:
    """In this process, from wherever it stands."""
    torch.set_num_threads(1)
    data = load_data("digits", SlimViT.load(run).architecture)
    images = (subset(data.train, range(IMAGES)), subset(data.test, range(TESTED)))
    finetune_run(run, images, {"epochs": epochs, "batch_size": IMAGES, "lr": 1e-3, "drop_path": 0.1}, 0, resume=True)


def broken(run: Path, epochs: int, seconds: float, seed: int) -> tuple[list[Sample], int]:
    """Train, and kill at moments up to so many seconds into the work; what was seen, and how many kills."""
    forks, draw = multiprocessing.get_context("forkserver"), random.Random(seed)  # noqa: S311
    forks.set_forkserver_preload(["lowpass.benchmarks.training.week"])
    samples, kills = list[Sample](), 0
    while True:
        before = _epoch(run)
        process = forks.Process(target=train, args=(run, epochs))
        process.start()
        assert process.pid is not None
        watched, patience = psutil.Process(process.pid), None
        while process.is_alive():
            process.join(LOOK_S)
            if patience is None and _epoch(run) > before:  # it works: from here on it may be killed
                patience = time.monotonic() + draw.uniform(0, seconds)
            if patience is not None and time.monotonic() > patience:
                break
        if process.is_alive():
            samples.append(Sample(_epoch(run), watched.memory_info().rss, _size(run)))
        elif process.exitcode:
            raise RunError(f"the training ended with {process.exitcode}")
        else:
            return samples, kills
        process.kill()
        process.join()
        kills += 1
        if kills % 10 == 0:
            console.print(f"{kills} kills, epoch {_epoch(run)} of {epochs}", soft_wrap=True)


def _epoch(run: Path) -> int:
    """Epochs that the table holds."""
    table = run / "training.csv"
    return max(0, len(table.read_text().splitlines()) - 1) if table.exists() else 0


def _size(run: Path) -> int:
    total = 0
    for file in run.rglob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue  # a state that another took the place of meanwhile
    return total


def rows(epochs: int, samples: list[Sample], kills: int, differing: list[str]) -> Iterator[Row]:
    """What came of it, and every sample."""
    yield Row({"what": "epochs"}, "times", epochs)
    yield Row({"what": "kills"}, "times", kills)
    yield Row({"what": "files that differ"}, "times", len(differing))
    for one in samples:
        yield Row({"epoch": one.epoch}, "memory_bytes", one.memory)
        yield Row({"epoch": one.epoch}, "disk_bytes", one.disk)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder of the runs, made anew.")] = Path("runs/week"),
    epochs: Annotated[int, typer.Option(min=1, help="How long.")] = 2000,
    seconds: Annotated[float, typer.Option(help="Of work at most, before a kill.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the kills.")] = 0,
) -> None:
    """Two trainings that must end alike."""
    shutil.rmtree(work, ignore_errors=True)
    searched = make_run(work)
    whole, killed = (Path(shutil.copytree(searched, work / name)) for name in ("whole", "killed"))
    train(whole, epochs)
    samples, kills = broken(killed, epochs, seconds, seed)
    differing = [name for name in LEFT if (whole / name).read_bytes() != (killed / name).read_bytes()]
    command = shlex.join(["python", "-m", "lowpass.benchmarks.training", *sys.argv[1:]])
    write_rows(out / "training_week.csv", list(rows(epochs, samples, kills, differing)), describe(), command)
    console.print(f"{epochs} epochs, {kills} kills; files that differ: {', '.join(differing) or 'none'}")
    raise typer.Exit(1 if differing else 0)
