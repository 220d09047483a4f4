"""Every candidate built by TensorRT-RTX, its kernels and the bytes they move counted."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from matplotlib.figure import Figure

from lowpass.benchmarks.figures import COLOURS, write_figure
from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.rows import Row, checked_out, read_rows, write_rows
from lowpass.benchmarks.speed.candidates import CANDIDATES, Candidate, candidates
from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.quantize import Quantization
from lowpass.export.onnx.quantize_half import quantize_half
from lowpass.export.onnx.trace import trace
from lowpass.export.options import Precision
from lowpass.export.runtimes.engine import compile_engine
from lowpass.export.tensorrt.layers import Layers, read_layers
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.progress import console

PRECISIONS: tuple[Precision, ...] = ("fp16", "int8-fp16", "fp8")
WHO = tuple(name for name in CANDIDATES if name != "uniform-width")
IMAGE = (3, 224, 224)
KEYS = ("model", "candidate", "precision", "batch")


def count_kernels(out: Path, models: Sequence[str], precisions: Sequence[str], command: str) -> None:
    """Build, count, and write `out`.csv after every engine and `out`.png at the end.

    Raises:
        InputError: a precision is unknown, or TensorRT-RTX is not installed.
    """
    chosen = [precision for precision in PRECISIONS if precision in precisions]
    if unknown := set(precisions) - set(chosen):
        raise InputError(f"kernels are counted in {', '.join(PRECISIONS)}, not {', '.join(sorted(unknown))}")
    machine, commit = describe(), checked_out()
    rows = list(_known(out.with_suffix(".csv"), commit))
    done = {tuple(str(row.of[key]) for key in KEYS) for row in rows}
    for model in models:
        for who in candidates(model, WHO):
            for precision in chosen:
                batches = (1, 32) if precision == "fp16" else (1,)
                left = [batch for batch in batches if (model, who.name, precision, str(batch)) not in done]
                for batch in left:
                    of = dict(zip(KEYS, (model, who.name, precision, batch), strict=True))
                    found = list(_rows(of, who, precision, batch))
                    console.print(f"{' '.join(map(str, of.values()))}: {found[0].figure} {found[0].value}")
                    rows += found
                    write_rows(out.with_suffix(".csv"), rows, machine, command, commit)
    plot(rows, out.with_suffix(".png"))


def _rows(of: Mapping[str, object], who: Candidate, precision: Precision, batch: int) -> Iterator[Row]:
    try:
        layers = built(who, precision, batch)
    except RunError as error:
        yield Row(of, "refused", str(error))
        return
    whole = layers.whole
    yield Row(of, "kernels", whole.kernels)
    yield Row(of, "fused_attentions", sum(kernel.is_attention for kernel in layers.kernels))
    products = [kernel for kernel in layers.kernels if kernel.kind in ("gemm", "runtime_fusion")]
    for kind in ("Int8", "FP8", "Half", "Float"):
        yield Row(of, f"products_in_{kind.lower()}", sum(kernel.computes_in == kind for kernel in products))
    if whole.macs is not None and whole.bytes_read is not None and whole.bytes_written is not None:
        yield Row(of, "macs", whole.macs)
        yield Row(of, "bytes_moved", whole.bytes_read + whole.bytes_written)


def built(who: Candidate, precision: Precision, batch: int) -> Layers:
    """The kernels of a candidate at one batch size, weights random, 8 bits calibrated on noise.

    Raises:
        RunError: TensorRT-RTX does not build it.
    """
    model: onnx.ModelProto = trace(who.at(precision), torch.zeros(2, *IMAGE))
    if precision != "fp16":
        noise = np.random.default_rng(0).standard_normal((2, *IMAGE), np.float32)
        model, _ = quantize_half(model, Quantization([noise]), precision)
    profile = BatchProfile(least=batch, best=batch, most=batch)
    (layers,) = read_layers(compile_engine("tensorrt-rtx", model.SerializeToString(), profile).log, model, profile)
    return layers


def _known(path: Path, commit: str) -> Iterator[Row]:
    """The rows of this commit that are there already."""
    for row in read_rows(path) if path.exists() else ():
        if row["commit"] == commit and set(KEYS) <= set(row):
            text = row["value"]
            value = int(text) if text.isdecimal() else text
            yield Row({key: row[key] for key in KEYS}, row["figure"], value)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Kernels at batch 1: a panel a precision, a group a model, a bar a candidate."""
    counts = {tuple(str(row.of[key]) for key in KEYS): row.value for row in rows if row.figure == "kernels"}
    models, names, precisions = (list(dict.fromkeys(key[place] for key in counts)) for place in range(3))
    figure = Figure(figsize=(7.5, 2.4 * len(precisions)), layout="constrained")
    panels = figure.subplots(len(precisions), 1, squeeze=False, sharey=True)[:, 0]
    width = 0.85 / len(names)
    for panel, precision in zip(panels, precisions, strict=True):
        for position, name in enumerate(names):
            for place, model in enumerate(models):
                count = counts.get((model, name, precision, "1"))
                if isinstance(count, int):
                    where = place + (position - (len(names) - 1) / 2) * width
                    label = name if place == 0 else None
                    panel.bar(where, count, 0.92 * width, color=COLOURS.get(name, "black"), label=label)
                    panel.text(where, count, str(count), ha="center", va="bottom", fontsize=6)
        panel.set_xticks(range(len(models)), models)
        panel.set_ylabel("kernels")
        panel.set_title(f"{precision}, batch 1", fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(ncols=len(names), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.35), frameon=False)
    write_figure(figure, path)
