"""Do all lowerings and precisions of one model agree with PyTorch? On crops of real photographs.

    python -m benchmarks.agreement --out benchmarks/results/agreement

The model has the paper's size, the shapes of its recipe and random weights: ImageNet's are not to be had without a
network, and which token of two stays hangs on rounding as it would with others. In FP32 one other token kept would move
logits by far more than what is allowed. Weights are drawn wide enough for classes to differ between crops. Results are
written after every setting.
"""

import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import typer
from pydantic import BaseModel, ConfigDict
from sklearn.datasets import load_sample_images
from torch import Tensor

from benchmarks.candidates import MODELS, RECIPES
from benchmarks.machine import Machine, describe, in_a_line
from export.options import ExportOptions, Precision
from export.quantize import Quantization, quantize
from export.selection import Selection
from export.to_onnx import to_onnx
from export.verify import Verification, compare
from pipeline.architecture import read_blocks
from pipeline.errors import InputError, RunError
from pipeline.files import write_json, write_text
from pipeline.progress import console
from pipeline.slim import SlimViT

SETTINGS: tuple[tuple[Precision, Selection], ...] = (
    ("fp32", "gather"),
    ("fp32", "onehot"),
    ("fp16", "gather"),
    ("bf16", "gather"),
    ("int8", "gather"),
)
BATCH = 8
CALIBRATION = 64  # crops for INT8, others than those that are compared
SPREAD = 3.0  # of the weights, over timm's own at the start
MEAN, STD = 0.5, 0.25


class Agreement(BaseModel):
    """Everything that was compared; `classes` is how many PyTorch told apart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str
    seconds: float
    machine: Machine
    model: str
    classes: int
    compared: dict[str, Verification]


def crops(count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of random square crops of scikit-learn's photographs, normalised [B, 3, size, size], and labels: none."""
    rng, photographs = np.random.default_rng(seed), load_sample_images().images
    for start in range(0, count, BATCH):
        batch = []
        for _ in range(min(BATCH, count - start)):
            photo = photographs[rng.integers(len(photographs))]
            top, left = (rng.integers(length - size + 1) for length in photo.shape[:2])
            batch.append(photo[top : top + size, left : left + size].transpose(2, 0, 1) / np.float32(255))
        images = torch.from_numpy((np.stack(batch) - MEAN) / STD).float()
        yield images, torch.zeros(len(batch), dtype=torch.int64)


def slim_model(model: str) -> SlimViT:
    """One of `benchmarks.candidates.MODELS` in the shapes of its recipe, with random weights."""
    torch.manual_seed(0)
    dense = SlimViT.from_timm(timm.create_model(MODELS[model]), token_score="cls").architecture
    slim = SlimViT(dense.model_copy(update={"blocks": read_blocks(RECIPES / f"{model}_paper.json")})).eval()
    with torch.no_grad():
        for parameter in slim.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, SPREAD * 0.02)
    return slim


def compared_with(slim: SlimViT, images: int, precision: Precision, selection: Selection) -> Verification:
    """One setting against PyTorch on `images` crops. INT8 is calibrated on other crops, and leaves no layer out: that
    is decided by top-1, of which random weights say nothing."""
    size = slim.architecture.dense.img_size[0]
    options = ExportOptions(precision=precision, selection=selection)
    graph = to_onnx(slim, options)
    if precision == "int8":
        graph, _ = quantize(graph, Quantization([batch.numpy() for batch, _ in crops(CALIBRATION, size, 1)]))
    name = f"{precision}, {selection}"
    return compare(name, graph.SerializeToString(), slim, list(crops(images, size, 0)), False, options)


def classes_of(slim: SlimViT, images: int) -> int:
    """How many classes PyTorch puts the crops into."""
    size = slim.architecture.dense.img_size[0]
    with torch.inference_mode():
        return len({int(top1) for batch, _ in crops(images, size, 0) for top1 in slim(batch).argmax(-1)})


def as_markdown(done: Agreement) -> str:
    """For people."""
    lines = [
        "# Do lowerings and precisions agree with PyTorch?",
        "",
        f"`{done.command}`, {done.seconds / 60:.0f} minutes on {in_a_line(done.machine)}",
        "",
        f"{done.model}, the shapes of its recipe, random weights; crops of photographs, which PyTorch puts into "
        f"{done.classes} classes.",
        "",
        "| file | runtime | images | same top-1 | largest logit difference | largest logit |",
        "|---|---|--:|--:|--:|--:|",
        *(
            f"| {name} | {one.runtime} | {one.images} | {one.same_top1:.1f}% | {one.largest_difference:.1e} "
            f"| {one.largest_logit:.1f} |"
            for name, one in done.compared.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _main(
    out: Annotated[Path, typer.Option(help="Where OUT.json and OUT.md go.")],
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "deit_small",
    images: Annotated[int, typer.Option(min=1, help="How many crops are compared.")] = 1000,
) -> None:
    """Do all lowerings and precisions of one model agree with PyTorch?"""
    if model not in MODELS:
        raise InputError(f"there is no model {model!r}; choose from {', '.join(MODELS)}")
    began, slim = time.monotonic(), slim_model(model)
    done = Agreement(
        command=shlex.join(["python", "-m", "benchmarks.agreement", *sys.argv[1:]]),
        seconds=0,
        machine=describe(),
        model=model,
        classes=classes_of(slim, images),
        compared={},
    )
    for precision, selection in SETTINGS:
        one = compared_with(slim, images, precision, selection)
        so_far = {"compared": done.compared | {one.file: one}, "seconds": time.monotonic() - began}
        done = done.model_copy(update=so_far)
        write_json(out.with_suffix(".json"), done.model_dump(mode="json"))
        write_text(out.with_suffix(".md"), as_markdown(done))
    console.print(as_markdown(done), soft_wrap=True, markup=False)


if __name__ == "__main__":
    try:
        typer.run(_main)
    except (InputError, RunError) as error:
        raise SystemExit(f"lowpass: {error}") from None
