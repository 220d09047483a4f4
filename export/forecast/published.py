"""Published latencies of dense ViTs, `published.csv`: a row each, with its source."""

import csv
import io
from dataclasses import dataclass
from functools import cache
from importlib import resources

from lowpass.export.forecast.cost import Flat
from lowpass.export.forecast.gpus import GPUS, Gpu
from lowpass.export.forecast.work import Engine, kernels, layer_bytes_of, work_of_name


@dataclass(frozen=True)
class Published:
    """One row. `engine` is the kind that ours are: FasterTransformer and AITemplate are compiled C++, as TensorRT. The
    former computes attention as products and a softmax, a kernel each."""

    gpu: Gpu
    engine: Engine
    precision: str
    model: str
    batch: int
    ms: float
    fused: bool  # attention, in one kernel
    flat: Flat


def engine_kind(engine: str) -> Engine:
    """By the name that its publisher gives it."""
    if "eager" in engine:
        return "pytorch-eager"
    return "pytorch-compiled" if "compiled" in engine else "tensorrt"


@cache
def published() -> tuple[Published, ...]:
    """All rows."""
    text = resources.files("lowpass.export.forecast").joinpath("published.csv").read_text()
    rows = list[Published]()
    for row in csv.DictReader(io.StringIO(text)):
        engine, precision, batch = engine_kind(row["engine"]), row["precision"], int(row["batch"])
        work = work_of_name(row["model"], int(row["img_size"]))
        flat = Flat.of(kernels(work, engine, batch, layer_bytes_of(precision)))
        gpu = GPUS[row["gpu"].lower().replace(" ", "")]
        fused = "FasterTransformer" not in row["engine"]
        rows.append(Published(gpu, engine, precision, row["model"], batch, float(row["ms"]), fused, flat))
    return tuple(rows)
