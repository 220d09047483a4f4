"""Timing several sessions side by side: interleaved rounds, so that all of them meet the same machine."""

import math
import time
from collections.abc import Mapping, Sequence
from statistics import median, quantiles

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from lowpass.export.runtimes.session import Images, Session, logits_of
from lowpass.pipeline.base.errors import RunError

ROUNDS = 20
# On noise two tokens may tie, and rounded to 16 or 8 bits the other of them stays: with the digits' slim model in at
# most 8 of 100 images, in OpenVINO and ONNX Runtime.
CHECKED, MAY_TIE = 24, 0.25  # images at least; fewer than this share may differ by more than the tolerance
WARM_UP_S = 0.3  # of each session, and two runs at least
Rounds = list[list[float]]  # milliseconds of every run, by round


class Latency(BaseModel):
    """One model at one batch size; images a second at the median."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    runs: int


def check_logits(session: Session, model: nn.Module, images: Images, tolerance: float) -> None:
    """Refuse to time a session whose logits are not those of `model`, in FP32 PyTorch, on images [B, C, H, W]. Few are
    shifted to make more. The session is left with `images` loaded.

    Raises:
        RunError: on a share `MAY_TIE` of them or more they differ by more than `tolerance` of the largest.
    """
    differences, largest = list[float](), 0.0
    for shift in reversed(range(-(-CHECKED // len(images)))):
        shifted = np.ascontiguousarray(np.roll(images, shift, -1))
        with torch.inference_mode():
            expected = model(torch.from_numpy(shifted)).numpy()
        differences += np.abs(logits_of(session, shifted) - expected).max(1).tolist()
        largest = max(largest, float(np.abs(expected).max()))
    allowed = math.ceil(MAY_TIE * len(differences)) - 1
    difference = sorted(differences)[-1 - allowed] / largest
    if not difference <= tolerance or not np.isfinite(differences).all():
        raise RunError(f"its logits differ from PyTorch's by {100 * difference:.1f}% of the largest")


def interleaved(sessions: Mapping[str, Session], seconds: float, least: int = ROUNDS) -> dict[str, Rounds]:
    """Milliseconds of every run, by session and round, at about `seconds` a session. Sessions take turns, and the order
    turns each round; each has its images loaded. There are `ROUNDS`, or as few as `least` where runs are long."""
    needed = {name: _warm_up(session) for name, session in sessions.items()}
    rounds = max(least, min(ROUNDS, round(seconds / max(needed.values()))))
    runs = {name: max(1, round(seconds / rounds / cost)) for name, cost in needed.items()}
    timed: dict[str, Rounds] = {name: [] for name in sessions}
    order = list(sessions)
    for _ in range(rounds):
        for name in order:
            timed[name].append([_milliseconds(sessions[name]) for _ in range(runs[name])])
        order.reverse()
    return timed


def latency(timed: Rounds, batch: int) -> Latency:
    """Percentiles over all runs."""
    every = np.concatenate([np.asarray(round_) for round_ in timed])
    p50, p90, p99 = (float(value) for value in np.percentile(every, [50, 90, 99]))
    return Latency(p50_ms=p50, p90_ms=p90, p99_ms=p99, images_per_s=1000 * batch / p50, runs=len(every))


def speedup(slow: Rounds, fast: Rounds) -> tuple[float, tuple[float, float]]:
    """How many times faster `fast` is: the median over the rounds, and its quartiles."""
    ratios: Sequence[float] = [median(a) / median(b) for a, b in zip(slow, fast, strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return middle, (low, high)


def _warm_up(session: Session) -> float:
    """Seconds of a run once warm."""
    began = time.perf_counter()
    runs: list[float] = []
    while len(runs) < 2 or time.perf_counter() - began < WARM_UP_S:
        runs.append(_milliseconds(session) / 1000)
    return median(runs)


def _milliseconds(session: Session) -> float:
    began = time.perf_counter_ns()
    session.run()
    return (time.perf_counter_ns() - began) / 1e6
