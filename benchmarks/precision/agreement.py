"""Do all lowerings and precisions of one model agree with PyTorch? On crops of real photographs.

    python -m lowpass.benchmarks.precision agreement --out benchmarks/results/agreement

The model has the paper's size and the shapes of its recipe. ImageNet's weights are not to be had without a network, so
its blocks are random, drawn wide enough for crops to differ; which token of two stays hangs on rounding as it would
with others, and in FP32 one other token kept would move logits by far more than what is allowed. It is read out twice:

- `random`: a random classifier of 1,000 classes, whose first two are as close as chance has them. What rounds it
  differently is seen at once, more often than in a model that was trained.
- `fitted`: a logistic regression that says from which quarter of which photograph a crop is. Its top-1 means something,
  so that INT8 is judged by it, as an export would be.

Results are written after every setting.
"""

import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import timm
import torch
import typer
from pydantic import BaseModel, ConfigDict
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from lowpass.benchmarks.latency.machine import Machine, describe, in_a_line
from lowpass.benchmarks.rows import Row, write_rows
from lowpass.benchmarks.speed.candidates import MODELS, RECIPES
from lowpass.export.onnx.quantize import Quantization, quantize
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.onnx.verify import Verification, compare
from lowpass.export.options import ExportOptions, Precision, Selection
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import console, track
from lowpass.pipeline.model.architecture import read_blocks
from lowpass.pipeline.model.slim_vit import SlimViT

SETTINGS: tuple[tuple[Precision, Selection], ...] = (
    ("fp32", "gather"),
    ("fp32", "onehot"),
    ("fp16", "gather"),
    ("bf16", "gather"),
    ("int8", "gather"),
)
Head = Literal["random", "fitted"]
HEADS: tuple[Head, ...] = get_args(Head)
BATCH = 8
# Crops of each use have a seed of their own.
COMPARED_SEED, CALIBRATION_SEED, JUDGING_SEED, FITTING_SEED = range(4)
CALIBRATION, JUDGING, FITTING = 64, 256, 1200  # crops: for the ranges of INT8, for its layers, for the classifier
SPREAD = 3.0  # of the weights, over timm's own at the start
MEAN, STD = 0.5, 0.25
# Inverse strengths tried, three folds each; the rest is what scikit-learn is about to make its default.
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
HOW: dict[str, Any] = {"cv": 3, "max_iter": 1000, "l1_ratios": (0,), "scoring": "neg_log_loss"}


class ReadOut(BaseModel):
    """One classifier on the blocks: how many classes PyTorch puts the compared crops into, how many of them rightly
    (percent; a random one knows of no right), what was compared, and which layers INT8 left out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes: int
    right: float | None
    compared: dict[str, Verification] = {}
    left_out: list[str] = []


class Agreement(BaseModel):
    """Everything that was compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str
    seconds: float
    machine: Machine
    model: str
    heads: dict[Head, ReadOut] = {}


def crops(count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random square crops of scikit-learn's photographs, normalised [B, 3, size, size], and the quarter of
    the photograph that each lies in: 0 to 3 of the first, 4 to 7 of the second [B]."""
    rng, photographs = np.random.default_rng(seed), load_sample_images().images
    for start in range(0, count, BATCH):
        batch, labels = [], []
        for _ in range(min(BATCH, count - start)):
            which = int(rng.integers(len(photographs)))
            photo = photographs[which]
            room = [length - size + 1 for length in photo.shape[:2]]
            top, left = (int(rng.integers(places)) for places in room)
            batch.append(photo[top : top + size, left : left + size].transpose(2, 0, 1) / np.float32(255))
            labels.append(4 * which + 2 * (2 * top >= room[0]) + (2 * left >= room[1]))
        yield torch.from_numpy((np.stack(batch) - MEAN) / STD).float(), torch.tensor(labels)


def slim_model(model: str, head: Head = "random") -> SlimViT:
    """One of `speed.candidates.MODELS` in the shapes of its recipe, with random blocks and either head."""
    torch.manual_seed(0)
    dense = SlimViT.from_timm(timm.create_model(MODELS[model]), token_score="cls").architecture
    slim = SlimViT(dense.model_copy(update={"blocks": read_blocks(RECIPES / f"{model}_paper.json")})).eval()
    with torch.no_grad():
        for parameter in slim.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, SPREAD * 0.02)
    return slim if head == "random" else _fitted(slim)


def _fitted(slim: SlimViT) -> SlimViT:
    """The same blocks with a classifier fitted to what they make of crops; its strength is cross-validated."""
    architecture, size = slim.architecture, slim.architecture.dense.img_size[0]
    slim.vit.head = nn.Identity()
    features, labels = [], []
    with torch.inference_mode():
        for batch, label in track(list(crops(FITTING, size, FITTING_SEED)), "fitting the classifier"):
            features.append(slim(batch))
            labels.append(label)
    regression = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=STRENGTHS, use_legacy_attributes=False, **HOW))
    scaler, logistic = regression.fit(torch.cat(features).numpy(), torch.cat(labels).numpy())
    classes = len(logistic.classes_)
    weight = logistic.coef_ / scaler.scale_
    head = nn.Linear(slim.vit.num_features, classes)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(logistic.intercept_ - weight @ scaler.mean_))
    dense = architecture.dense.model_copy(update={"num_classes": classes})
    fitted = SlimViT(architecture.model_copy(update={"dense": dense})).eval()
    slim.vit.head = head
    fitted.load_state_dict(slim.state_dict())
    return fitted


def compared_with(
    slim: SlimViT, images: int, precision: Precision, selection: Selection, judged: bool = False
) -> tuple[Verification, list[str]]:
    """One setting against PyTorch on `images` crops, and the layers that INT8 leaves out: INT8 is calibrated on other
    crops, and leaves none out unless it is `judged`: by top-1, of which a random classifier says nothing."""
    size = slim.architecture.dense.img_size[0]
    options = ExportOptions(precision=precision, selection=selection)
    graph, left_out = to_onnx(slim, options), list[str]()
    if precision == "int8":
        calibration, judging = (
            [batch.numpy() for batch, _ in crops(count, size, seed)]
            for count, seed in ((CALIBRATION, CALIBRATION_SEED), (JUDGING if judged else 0, JUDGING_SEED))
        )
        graph, left_out = quantize(graph, Quantization(calibration, judging))
    content, batches = graph.SerializeToString(), list(crops(images, size, COMPARED_SEED))
    return compare(f"{precision}, {selection}", content, slim, batches, False, options), left_out


def read_out(slim: SlimViT, images: int, head: Head) -> ReadOut:
    """What PyTorch makes of the compared crops."""
    size, right, classes = slim.architecture.dense.img_size[0], 0, set[int]()
    with torch.inference_mode():
        for batch, labels in crops(images, size, COMPARED_SEED):
            top1 = slim(batch).argmax(-1)
            classes |= set(top1.tolist())
            right += int((top1 == labels).sum())
    return ReadOut(classes=len(classes), right=100 * right / images if head == "fitted" else None)


def as_markdown(done: Agreement) -> str:
    """For people."""
    lines = [
        "# Do lowerings and precisions agree with PyTorch?",
        "",
        f"`{done.command}`, {done.seconds / 60:.0f} minutes on {in_a_line(done.machine)}",
        "",
        f"{done.model}, the shapes of its recipe, random blocks, crops of photographs. The random classifier has 1,000 "
        "classes and margins as narrow as chance makes them; the fitted one says which quarter of which photograph a "
        "crop is from.",
        "",
        "| classifier | file | runtime | images | same top-1 | largest logit difference | largest logit |",
        "|---|---|---|--:|--:|--:|--:|",
        *(
            f"| {head} | {name} | {one.runtime} | {one.images} | {one.same_top1:.1f}% | {one.largest_difference:.1e} "
            f"| {one.largest_logit:.1f} |"
            for head, seen in done.heads.items()
            for name, one in seen.compared.items()
        ),
        "",
    ]
    for head, seen in done.heads.items():
        rightly = "" if seen.right is None else f", {seen.right:.1f}% of them rightly"
        line = f"- {head}: PyTorch puts the crops into {seen.classes} classes{rightly}"
        if any(name.startswith("int8") for name in seen.compared):
            line += f"; INT8 leaves {', '.join(seen.left_out) or 'no layer'} out"
        lines.append(line + ".")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Where OUT.csv goes.")],
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "deit_small",
    images: Annotated[int, typer.Option(min=1, help="How many crops are compared.")] = 1000,
) -> None:
    """Do all lowerings and precisions of one model agree with PyTorch?"""
    if model not in MODELS:
        raise InputError(f"there is no model {model!r}; choose from {', '.join(MODELS)}")
    began = time.monotonic()
    command = shlex.join(["python", "-m", "lowpass.benchmarks.precision", *sys.argv[1:]])
    done = Agreement(command=command, seconds=0, machine=describe(), model=model)
    for head in HEADS:
        slim = slim_model(model, head)
        seen = read_out(slim, images, head)
        for precision, selection in SETTINGS:
            one, left_out = compared_with(slim, images, precision, selection, judged=head == "fitted")
            seen = seen.model_copy(update={"compared": seen.compared | {one.file: one}, "left_out": left_out})
            so_far = {"heads": done.heads | {head: seen}, "seconds": time.monotonic() - began}
            done = done.model_copy(update=so_far)
            write_rows(out.with_suffix(".csv"), rows(done), done.machine, command)
    console.print(as_markdown(done), soft_wrap=True, markup=False)


def rows(done: Agreement) -> Iterator[Row]:
    """Every file against PyTorch, and what PyTorch itself makes of the crops."""
    for head, seen in done.heads.items():
        yield Row({"model": done.model, "classifier": head}, "classes_seen", seen.classes)
        if seen.right is not None:
            yield Row({"model": done.model, "classifier": head}, "right_percent", seen.right)
        for name, one in seen.compared.items():
            precision, selection = name.split(", ")
            of = {"model": done.model, "classifier": head, "precision": precision, "selection": selection}
            of |= {"runtime": one.runtime}
            yield Row(of, "images", one.images)
            yield Row(of, "same_top1_percent", one.same_top1)
            yield Row(of, "largest_difference", one.largest_difference)
            yield Row(of, "largest_logit", one.largest_logit)
            if precision == "int8":
                yield Row(of, "layers_left_out", len(seen.left_out))
