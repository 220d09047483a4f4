"""Goals for `--target-latency`: planned by a table of parts, which is cached, and checked on whole models."""

import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from lowpass.benchmarks.latency.parts import measure_table
from lowpass.benchmarks.latency.setup import QUANTILE, TimingSetup, machine_of, refuse, whole_session
from lowpass.benchmarks.latency.timing import interleaved
from lowpass.export.graph.deployable import deployable
from lowpass.export.options import Precision
from lowpass.export.runtimes.registry import RuntimeName, check_precision, default_precision, missing, parse_runtimes
from lowpass.pipeline.base import files
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_json
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.latency_table import LatencyTable, read_table
from lowpass.pipeline.search.target import CostTarget

LOOKS, SLOWER = 4, 1.07  # at a whole model, while dense is slower than that times its best


def latency_target(
    architecture: Architecture,
    target_ms: float,
    runtime: RuntimeName,
    precision: Precision,
    batch: int,
    cache_dir: Path | None = None,
) -> CostTarget:
    """A target in milliseconds, planned by the cached table if one fits, else by one that is measured now.

    Args:
        architecture: of the dense model, with the token score it will be searched with.
        target_ms: of one batch.
        runtime: see `measure_table`, and so are the next two.
        precision: see there.
        batch: see there.
        cache_dir: None for `$XDG_CACHE_HOME/lowpass`.

    Raises:
        InputError: see `measure_table`.
    """
    table = latency_table(architecture, runtime, precision, batch, cache_dir)
    quiet = math.inf  # the dense model's best pace so far

    def measure(slim: Architecture) -> float:
        nonlocal quiet
        looks: list[tuple[float, float]] = []
        while len(looks) < LOOKS:
            looks.append(against_dense(slim, architecture, runtime, precision, batch))
            # A neighbour that slows the machine does not slow both models alike: look again, unless it stays that way.
            if looks[-1][0] <= SLOWER * quiet < math.inf:
                break
        dense_ms, speed = min(looks)
        quiet = min(quiet, dense_ms)
        return quiet / speed

    return CostTarget(value=target_ms, costs=table, unit="ms", measure=measure, batch=batch)


def checked_runtime(runtime: str | None, precision: Precision | None) -> tuple[RuntimeName, Precision]:
    """A runtime by name, and a precision it computes in: the one asked for, or its own.

    Raises:
        InputError: the runtime is unknown or not here, or lacks the precision.
    """
    name = parse_runtimes(runtime)[0]
    if reason := missing(name):
        raise InputError(f"cannot measure latencies on {name}: {reason}")
    chosen = precision or default_precision(name)
    check_precision(name, chosen)
    return name, chosen


def latency_table(
    architecture: Architecture,
    runtime: RuntimeName,
    precision: Precision,
    batch: int,
    cache_dir: Path | None = None,
) -> LatencyTable:
    """The cached table if one fits, else one that is measured now, and cached. Arguments as of `latency_target`.

    Raises:
        InputError: see `measure_table`.
    """
    refuse(runtime, precision)
    scored = f"{architecture.token_criterion}.{architecture.token_score}"
    name = f"{architecture.dense.name}.{scored}.{runtime}.{precision}.batch{batch}.json"
    path = (files.cache_dir() if cache_dir is None else cache_dir) / name
    table = _cached(path, architecture, runtime)
    if table is None:
        table = measure_table(architecture, runtime, precision, batch)
        try:
            write_json(path, table.model_dump(mode="json"))
        except OSError as error:
            console.print(f"the latency table is not kept: cannot write {path}: {error.strerror}", soft_wrap=True)
    return table


def _cached(path: Path, architecture: Architecture, runtime: RuntimeName) -> LatencyTable | None:
    """The table of a cache file, if it still fits; runtime, precision and batch are in the file's name."""
    if not path.exists():
        return None
    try:
        table = read_table(path)
    except InputError:
        console.print(f"{path} is damaged: measuring it anew", soft_wrap=True)
        return None
    scored = (architecture.dense, architecture.token_score, architecture.token_criterion)
    if (table.dense, table.token_score, table.token_criterion) != scored:
        console.print(f"{path} is of another {architecture.dense.name}: measuring it anew", soft_wrap=True)
        return None
    was, now = table.machine, machine_of(runtime)
    differences = [
        f"{key} was {was.get(key)}, is {now.get(key)}" for key in {**now, **was} if was.get(key) != now.get(key)
    ]
    if differences:
        console.print(f"{path} is of another machine ({'; '.join(differences)}): measuring it anew", soft_wrap=True)
        return None
    return table


def against_dense(
    slim: Architecture,
    dense: Architecture,
    runtime: RuntimeName,
    precision: Precision,
    batch: int,
    seconds: float = 3.0,
) -> tuple[float, float]:
    """Milliseconds of a batch through the dense model, and how many times faster the slim one is, both with random
    weights and at the 10th percentile. They take turns, so that a machine that is slow for a while slows both.

    Raises:
        InputError: the runtime is missing here, or lacks the precision.
        RunError: it cannot run a model.
    """
    refuse(runtime, precision)
    sessions = {}
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        for name, architecture in (("dense", dense), ("slim", slim)):
            (Path(folder) / name).mkdir()
            setup = TimingSetup(runtime, precision, batch, Path(folder) / name)
            module = deployable(SlimViT(architecture), setup.precision)
            sessions[name] = whole_session(module, architecture.dense, setup, quantised=True)
        rounds = interleaved(sessions, seconds)
    dense_ms, slim_ms = (float(np.percentile(np.concatenate(rounds[name]), QUANTILE)) for name in ("dense", "slim"))
    return dense_ms, dense_ms / slim_ms
