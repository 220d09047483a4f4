"""What a precision gains over FP32: dense and slim, every precision of a runtime in turns in one process.

    python -m lowpass.benchmarks.precision gains --out benchmarks/results/precisions

The suite times runtime after runtime, minutes apart, on a machine that may change between; ratios across its precisions
carry that. Here they do not. Weights are random and checked as in the suite. Results are written after every batch
size.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import BaseModel, ConfigDict

from lowpass.benchmarks.latency.machine import Machine, describe, in_a_line
from lowpass.benchmarks.latency.timing import Latency, check_logits, interleaved, latency, speedup
from lowpass.benchmarks.rows import Row, latency_rows, write_rows
from lowpass.benchmarks.speed.candidates import MODELS, Candidate, candidates
from lowpass.benchmarks.speed.sessions import MIN_ROUNDS, TOLERANCE, Files, noise, open_rival
from lowpass.export.batch import parse_batches
from lowpass.export.options import DTYPES, Precision
from lowpass.export.runtimes.registry import SUPPORTED, RuntimeName, missing
from lowpass.export.runtimes.session import Session
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import console

ON_CPU: tuple[RuntimeName, ...] = ("onnxruntime", "openvino")
BASE: Precision = "fp32"
WHO = ("dense", "lowpass")


class Gain(BaseModel):
    """One model in one precision: its latency, and how many times faster than itself in FP32, round by round."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latency: Latency
    gain: float
    gain_quartiles: tuple[float, float]


class Precisions(BaseModel):
    """Everything that was measured: runtime -> batch -> model -> precision."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str
    seconds: float
    machine: Machine
    model: str
    runtimes: dict[RuntimeName, dict[int, dict[str, dict[str, Gain]]]] = {}


def measure(
    rivals: Sequence[Candidate], runtime: RuntimeName, batches: Sequence[int], seconds: float, files: Files
) -> Iterator[tuple[int, dict[str, dict[str, Gain]]]]:
    """All models in every precision of one runtime that gains by it on a CPU, in turns, batch size by batch size.

    Args:
        rivals: the models.
        runtime: of `ON_CPU`.
        batches: sizes.
        seconds: about how long each is timed for.
        files: see `open_rival`.

    Raises:
        RunError: a session cannot be made, or its logits are not the model's.
    """
    sessions: dict[tuple[str, Precision], Session] = {}
    for rival in rivals:
        for precision in SUPPORTED[runtime]:
            if DTYPES[precision] == torch.float16:  # CPUs have no kernels for it: it is computed in FP32, with casts
                continue
            session, _ = open_rival(rival, runtime, precision, files)
            check_logits(session, rival.at(BASE), noise(2), TOLERANCE[precision])
            sessions[rival.name, precision] = session
    for batch in batches:
        for session in sessions.values():
            session.load(noise(batch))
        timed = interleaved({" ".join(key): session for key, session in sessions.items()}, seconds, MIN_ROUNDS)
        gains: dict[str, dict[str, Gain]] = {rival.name: {} for rival in rivals}
        for name, precision in sessions:
            rounds = timed[f"{name} {precision}"]
            factor, quartiles = speedup(timed[f"{name} {BASE}"], rounds)
            gains[name][precision] = Gain(latency=latency(rounds, batch), gain=factor, gain_quartiles=quartiles)
        yield batch, gains


def as_markdown(done: Precisions) -> str:
    """For people."""
    lines = [
        "# What precisions gain over FP32",
        "",
        f"`{done.command}`, {done.seconds / 60:.0f} minutes on {in_a_line(done.machine)} "
        f"({', '.join(done.machine.matrix_units) or 'no matrix units'})",
        "",
        f"{done.model}, random weights; medians of interleaved rounds, every precision of a runtime in turns.",
        "",
        "| runtime | batch | model | precision | p50 ms | over its own FP32 (quartiles) |",
        "|---|--:|---|---|--:|--:|",
    ]
    for runtime, batches in done.runtimes.items():
        for batch, models in batches.items():
            for name, precisions in models.items():
                for precision, one in precisions.items():
                    low, high = one.gain_quartiles
                    cells = [runtime, str(batch), name, precision, f"{one.latency.p50_ms:.2f}"]
                    lines.append(f"| {' | '.join(cells)} | {one.gain:.2f}x ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path, typer.Option(help="Where OUT.csv goes.")],
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "deit_small",
    batches: Annotated[str, typer.Option(help="Batch sizes.")] = "1,8,32",
    seconds: Annotated[float, typer.Option(min=0.05, help="To time each session for.")] = 6.0,
) -> None:
    """What a precision gains over FP32."""
    if model not in MODELS:
        raise InputError(f"there is no model {model!r}; choose from {', '.join(MODELS)}")
    began, command = time.monotonic(), shlex.join(["python", "-m", "lowpass.benchmarks.precision", *sys.argv[1:]])
    done = Precisions(command=command, seconds=0, machine=describe(), model=model)
    rivals, files = candidates(model, WHO), Files()
    for runtime in ON_CPU:
        reason = missing(runtime)
        console.print(f"{model}: {runtime}: {reason or 'measuring'}", soft_wrap=True)
        if reason is not None:
            continue
        for batch, gains in measure(rivals, runtime, parse_batches(batches), seconds, files):
            so_far = done.runtimes.get(runtime, {}) | {batch: gains}
            update = {"runtimes": done.runtimes | {runtime: so_far}, "seconds": time.monotonic() - began}
            done = done.model_copy(update=update)
            write_rows(out.with_suffix(".csv"), rows(done), done.machine, command)
    console.print(as_markdown(done), soft_wrap=True, markup=False)


def rows(done: Precisions) -> Iterator[Row]:
    """Latencies, and how many times faster than the same model in FP32, with quartiles over the rounds."""
    for runtime, batches in done.runtimes.items():
        for batch, models in batches.items():
            for name, precisions in models.items():
                for precision, one in precisions.items():
                    of = {"model": done.model, "runtime": runtime, "batch": batch, "candidate": name}
                    of |= {"precision": precision}
                    yield from latency_rows(of, one.latency)
                    yield Row(of, "gain_over_fp32", one.gain, *one.gain_quartiles)
