"""Images a second of `lowpass finetune`, against the loop that one would write with timm for the same model.

    python -m lowpass.benchmarks.training throughput

Both read the same images with the same augmentation and as many reading processes, and step timm's AdamW with layer
decay behind clipped gradients. The bare loop that learns from labels has cross entropy and nothing else; with a teacher
it has also a forward of the dense model and timm's moving average, as the default of `finetune` has. What `finetune`
does besides is counted: the moving average always, seeds by place, checks of losses and labels, the log, the state that
is saved after every epoch. Loops take turns; a time is of a whole training, from weights to weights.
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, cast

import timm
import torch
import typer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.lookups import different, number, one, study
from lowpass.benchmarks.rows import RESULTS, Row, markdown, write_rows
from lowpass.benchmarks.serving.pictures import make_pictures
from lowpass.benchmarks.speed.candidates import MODELS, RECIPES
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.data.datasets import Data, len_of, load_data, skipping
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import read_blocks
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.train.finetune import CLIP, finetune
from lowpass.pipeline.train.settings import FinetuneSettings
from lowpass.pipeline.train.state import TrainingState

# The digits at about the paper's share of their MACs, as a search leaves them.
DIGITS = [BlockShape(heads=3, qk_dim=32, v_dim=32, hidden=128, keep=keep) for keep in (64, 64, 64, 31, 31, 31)]
TURNS = 7
CLASSES = ("a", "b", "c", "d")  # of 16 pictures each
LOOPS = {"labels": 0.0, "labels and a teacher": 0.25}  # -> the teacher's share of the loss


@dataclass(frozen=True)
class Subject:
    """What is trained: a slim model and its dense one, on so many images, for so many epochs."""

    name: str
    slim: SlimViT
    dense: SlimViT
    data: Data
    settings: FinetuneSettings

    @property
    def images(self) -> int:
        """That a training sees."""
        a_step = self.settings.batch_size
        return self.settings.epochs * (len_of(self.data.train) // a_step) * a_step


def digits() -> Subject:
    """The embedded model on its scenes: so small that what surrounds a step shows."""
    dense = SlimViT.from_timm(load_model("digits_deit"))
    data = load_data("digits", dense.architecture)
    return _subject("digits", dense, tuple(DIGITS), data, FinetuneSettings(epochs=2, batch_size=64))


def deit_small(folder: Path) -> Subject:
    """DeiT-Small of the paper's shape, random weights, on JPEG files that are augmented as in the recipe."""
    for split in ("train", "val"):
        for label in CLASSES:
            (folder / split / label).mkdir(parents=True)
            make_pictures(folder / split / label)
    torch.manual_seed(0)
    dense = SlimViT.from_timm(timm.create_model(MODELS["deit_small"], num_classes=len(CLASSES)).eval())
    blocks, data = read_blocks(RECIPES / "deit_small_paper.json"), load_data(str(folder), dense.architecture)
    return _subject("deit_small", dense, blocks, data, FinetuneSettings(epochs=1, batch_size=16))


def _subject(
    name: str, dense: SlimViT, blocks: tuple[BlockShape, ...], data: Data, settings: FinetuneSettings
) -> Subject:
    slim = SlimViT(dense.architecture.model_copy(update={"blocks": blocks})).eval()
    return Subject(name, slim, dense, data, settings)


def ours(subject: Subject, weight: float) -> None:
    """`lowpass finetune`, with the state that it saves."""
    settings = subject.settings.model_copy(update={"distill_weight": weight})
    with tempfile.TemporaryDirectory() as folder:
        state = TrainingState(Path(folder))
        finetune(deepcopy(subject.slim), subject.dense if weight else None, subject.data, settings, 0, state)


def bare(subject: Subject, weight: float) -> None:
    """The same model, images and optimiser, and a loop of ten lines."""
    settings, model = subject.settings, deepcopy(subject.slim).train()
    loader: Any = DataLoader(
        cast(Any, subject.data.train),
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=subject.data.workers,
        collate_fn=skipping,
    )
    rate = settings.lr * settings.batch_size / 512
    optimiser: Any = create_optimizer_v2(
        model.vit, opt="adamw", lr=rate, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay
    )
    ema = ModelEmaV3(model, decay=settings.ema_decay) if weight else None
    for _ in range(settings.epochs):
        for images, labels in loader:
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if weight:
                with torch.no_grad():
                    answer = subject.dense(images).argmax(-1)
                loss = (1 - weight) * loss + weight * F.cross_entropy(logits, answer)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            optimiser.zero_grad()
            if ema is not None:
                ema.update(model)


def rates(subject: Subject, turns: int) -> dict[str, dict[str, list[float]]]:
    """Images a second: what is learnt from -> whose loop -> turn by turn."""
    found: dict[str, dict[str, list[float]]] = {name: {"bare": [], "lowpass": []} for name in LOOPS}
    for turn in range(turns):
        for name, weight in LOOPS.items():
            for whose, train in (("bare", bare), ("lowpass", ours)):
                began = time.perf_counter()
                train(subject, weight)
                rate = subject.images / (time.perf_counter() - began)
                found[name][whose].append(rate)
                console.print(f"{subject.name}, {name}, {whose}: {rate:.1f} images/s ({turn + 1} of {turns})")
    return found


def rows(of: str, found: dict[str, dict[str, list[float]]]) -> Iterator[Row]:
    """Medians with the least and the most, and what is kept of the bare loop's speed, turn by turn."""
    for name, loops in found.items():
        for whose, each in loops.items():
            yield Row({"model": of, "from": name, "loop": whose}, "images_per_s", median(each), min(each), max(each))
        kept = [ours_ / bare_ for bare_, ours_ in zip(loops["bare"], loops["lowpass"], strict=True)]
        yield Row({"model": of, "from": name, "loop": "lowpass"}, "of_bare", median(kept), min(kept), max(kept))


def training_throughput(results: Path) -> str:
    """The table of the documents."""
    found, lines = study(results, "training_throughput"), []
    for model, learnt_from in different(found, "model", "from"):
        of = {"model": model, "from": learnt_from}
        speeds = [number(one(found, "images_per_s", loop=loop, **of), "{:.1f}") for loop in ("bare", "lowpass")]
        kept = one(found, "of_bare", loop="lowpass", **of)
        assert kept is not None
        share, low, high = (float(kept[name]) for name in ("value", "low", "high"))
        lines.append([model, learnt_from, *speeds, f"{share:.2f} ({low:.2f} to {high:.2f})"])
    header = ["model", "learns from", "bare loop, images/s", "`finetune`, images/s", "of the bare loop (least to most)"]
    return markdown(header, lines, 2)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    turns: Annotated[int, typer.Option(min=1, help="Of each loop.")] = TURNS,
) -> None:
    """Images a second of `finetune` against a bare loop with timm."""
    with tempfile.TemporaryDirectory() as folder:
        subjects = (digits(), deit_small(Path(folder)))
        found = [row for subject in subjects for row in rows(subject.name, rates(subject, turns))]
    command = shlex.join(["python", "-m", "lowpass.benchmarks.training", *sys.argv[1:]])
    write_rows(out / "training_throughput.csv", found, describe(), command)
    console.print(training_throughput(out), soft_wrap=True, markup=False)
