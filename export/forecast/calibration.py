"""The rates that make the cost model meet published latencies, and how far off it is where it has not seen them.

Rates are products of an engine's, a GPU's and a pair's of both, fitted together by least squares on logarithms
(`scipy.optimize.least_squares`, soft L1: a few rows that are off do not rule). Each is drawn towards what it would be
without data (`PRIOR`; 1 for a GPU's and a pair's), so that a GPU or an engine without rows gets what is common.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.optimize import least_squares

from lowpass.export.forecast.cost import Flat, Floats, Rates, Speeds, times
from lowpass.export.forecast.gpus import Gpu
from lowpass.export.forecast.published import Published
from lowpass.export.forecast.work import ENGINES, Engine

FILE = "calibration.json"
PRIOR: dict[Engine, Rates] = {
    "tensorrt": Rates(0.55, 0.4, 0.7, 4.0, 0.2),
    "pytorch-compiled": Rates(0.9, 0.6, 0.8, 8.0, 0.3),
    "pytorch-eager": Rates(0.9, 0.6, 0.8, 15.0, 0.3),
}
FIELDS = ("gemm", "attention", "memory", "cost_us", "fill")
OF_GPU, OF_PAIR = ("gemm", "memory"), ("gemm", "memory", "cost_us")
UNFUSED = 0.15  # of fused attention's rate, without data
# How hard logarithms are drawn, in spreads of a row.
HELD = {"engine": 0.3, "gpu": 0.5, "pair": 0.5, "factors": 0.3}
SPREAD = 0.07  # of rows of one engine and GPU around a good model


class HeldOut(BaseModel):
    """Relative errors of forecasts of rows that were left out: the median, and what nine in ten stay below."""

    model_config = ConfigDict(frozen=True)

    rows: int
    median: float
    nine_in_ten: float


class Calibration(BaseModel):
    """Fitted rates: of engines, and factors of GPUs (`a100`) and pairs (`a100 tensorrt`); `int8` on `gemm`, `unfused`
    on `attention`. `least_batch` that an engine was published at.

    `models_left_out` by pair, `gpus_left_out` by GPU and, for GPUs without rows, by engine and over `all`."""

    model_config = ConfigDict(frozen=True)

    engines: dict[str, dict[str, float]]
    gpus: dict[str, dict[str, float]]
    pairs: dict[str, dict[str, float]]
    int8: float
    unfused: float
    least_batch: dict[str, int]
    models_left_out: dict[str, HeldOut] = {}
    gpus_left_out: dict[str, HeldOut] = {}

    def rates(self, gpu: Gpu, engine: Engine, precision: str, fused: bool = True) -> Rates:
        """For a GPU, whether it has rows or not."""
        found = dict(self.engines[engine])
        for factors in (self.gpus.get(gpu.name, {}), self.pairs.get(f"{gpu.name} {engine}", {})):
            for field, factor in factors.items():
                found[field] *= factor
        if precision not in ("fp16", "bf16"):
            found["gemm"] *= self.int8
        if not fused:
            found["attention"] *= self.unfused
        return Rates(**found)


def seconds(row: Published, calibration: Calibration) -> float:
    """Forecast of a row."""
    rates = calibration.rates(row.gpu, row.engine, row.precision, row.fused)
    return float(times(row.flat, Speeds.of(row.gpu, row.precision), rates).whole.sum())


def fit(rows: Sequence[Published]) -> Calibration:
    """Rates for these rows, without errors left out."""
    gpus = sorted({row.gpu.name for row in rows})
    pairs = sorted({_pair(row) for row in rows})
    of = _Indices(
        engine=np.array([ENGINES.index(row.engine) for row in rows]),
        gpu=np.array([gpus.index(row.gpu.name) for row in rows]),
        pair=np.array([pairs.index(_pair(row)) for row in rows]),
        int8=np.array([row.precision == "int8" for row in rows]),
        unfused=np.array([not row.fused for row in rows]),
        kernel=np.repeat(np.arange(len(rows)), [len(row.flat.flops) for row in rows]),
    )
    flat = Flat.joined([row.flat for row in rows])
    known = [Speeds.of(row.gpu, row.precision) for row in rows]
    speeds = Speeds(*(np.array([getattr(one, name) for one in known])[of.kernel] for name in Speeds.__match_args__))
    sizes = [len(ENGINES) * len(FIELDS), len(gpus) * len(OF_GPU), len(pairs) * len(OF_PAIR), 2]
    start = np.zeros(sum(sizes))
    start[: sizes[0]] = np.log([[getattr(PRIOR[engine], field) for field in FIELDS] for engine in ENGINES]).ravel()
    start[-1] = np.log(UNFUSED)
    held = np.concatenate([np.full(size, HELD[what]) for size, what in zip(sizes, HELD, strict=True)])
    wanted = np.log([row.ms / 1000 for row in rows])

    def residuals(values: Floats) -> Floats:
        taken = times(flat, speeds, _rates(np.split(np.exp(values), np.cumsum(sizes)[:-1]), of)).whole
        off = np.log(np.bincount(of.kernel, taken)) - wanted
        return np.concatenate([off / SPREAD, held * (values - start)])

    values = least_squares(residuals, start, loss="soft_l1", max_nfev=60).x
    engines, of_gpus, of_pairs, (int8, unfused) = np.split(np.exp(values), np.cumsum(sizes)[:-1])
    least = {engine: min([row.batch for row in rows if row.engine == engine], default=0) for engine in ENGINES}
    return Calibration(
        engines=_named(ENGINES, FIELDS, engines),
        gpus=_named(gpus, OF_GPU, of_gpus),
        pairs=_named(pairs, OF_PAIR, of_pairs),
        int8=float(int8),
        unfused=float(unfused),
        least_batch={str(engine): batch for engine, batch in least.items()},
    )


@dataclass(frozen=True)
class _Indices:
    """Of each row, its engine, GPU and pair, and whether its factors count; of each kernel its row."""

    engine: NDArray[np.intp]
    gpu: NDArray[np.intp]
    pair: NDArray[np.intp]
    int8: NDArray[np.bool_]
    unfused: NDArray[np.bool_]
    kernel: NDArray[np.intp]


def _rates(parts: Sequence[Floats], of: _Indices) -> Rates:
    """Of every kernel, from what is fitted."""
    found = dict(zip(FIELDS, parts[0].reshape(-1, len(FIELDS))[of.engine].T, strict=True))
    for fields, values, index in ((OF_GPU, parts[1], of.gpu), (OF_PAIR, parts[2], of.pair)):
        for field, factors in zip(fields, values.reshape(-1, len(fields))[index].T, strict=True):
            found[field] = found[field] * factors
    found["gemm"] = found["gemm"] * np.where(of.int8, parts[3][0], 1)
    found["attention"] = found["attention"] * np.where(of.unfused, parts[3][1], 1)
    return Rates(**{field: values[of.kernel] for field, values in found.items()})


def _pair(row: Published) -> str:
    return f"{row.gpu.name} {row.engine}"


def _named(names: Sequence[str], fields: Sequence[str], values: Floats) -> dict[str, dict[str, float]]:
    rows = values.reshape(len(names), len(fields)).tolist()
    return {name: dict(zip(fields, row, strict=True)) for name, row in zip(names, rows, strict=True)}


def calibration() -> Calibration:
    """The one that comes with the code, made by `python -m lowpass.benchmarks.forecast`."""
    text = resources.files("lowpass.export.forecast").joinpath(FILE).read_text()
    return Calibration.model_validate_json(text)
