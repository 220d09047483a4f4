"""The serving benchmark holds out: against a machine that stands still for a moment, and against being ended."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lowpass.benchmarks.rows import read_rows
from lowpass.benchmarks.serving import benchmark, overload
from lowpass.benchmarks.serving.benchmark import KINDS, Overhead, Result, run_benchmark
from lowpass.benchmarks.serving.load import Point, RefusedError
from lowpass.benchmarks.serving.overload import ATTEMPTS, Overload


def test_a_loop_that_was_refused_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def refused(times: int) -> float:
        asked.clear()

        def loop(*_: object) -> SimpleNamespace:
            asked.append(1)
            if len(asked) <= times:
                raise RefusedError("Request timeout expired")
            return SimpleNamespace(images_per_s=12.0)

        monkeypatch.setattr(overload, "closed_loop", loop)
        return overload._answered("", "model", np.zeros((4, 1), np.float32), 8, 1.0)

    assert refused(ATTEMPTS - 1) == 3.0  # requests, each of four images
    with pytest.raises(RefusedError):
        refused(ATTEMPTS)


def test_a_model_that_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, ended = list[str](), True

    def measure(run: Path, url: str, name: str, *_: object) -> Result:
        if name == "deit_small" and ended:
            raise KeyboardInterrupt
        measured.append(name)
        point = Point(
            kind="closed",
            offered=1,
            request_images=1,
            images_per_s=100.0 + len(measured),
            p50_ms=1,
            p95_ms=1,
            p99_ms=1,
            requests=1,
            mean_batch=1,
            queue_ms=0,
            compute_ms=None,
            batches={3: 1},
        )
        flood = Overload(**dict.fromkeys(Overload.model_fields, 1))
        overhead = Overhead(batch=8, bare_ms=1, served_ms=1, percent=0)
        return Result(
            macs_saved=2,
            points={kind: [point] for kind in KINDS},
            overhead=dict.fromkeys(KINDS, overhead),
            gain=2,
            gain_int8=2,
            floods={kind: [flood] for kind in KINDS},
        )

    supervisor = SimpleNamespace(process=SimpleNamespace(pid=1), watch=lambda: None)
    monkeypatch.setattr(benchmark, "prepare", lambda model, work: work / model)
    monkeypatch.setattr(benchmark, "deploy", lambda *_: None)
    monkeypatch.setattr(benchmark, "find_server", lambda _: None)
    monkeypatch.setattr(benchmark, "Supervisor", lambda *_: nullcontext(supervisor))
    monkeypatch.setattr(benchmark, "measure", measure)

    def run(seconds: float) -> None:
        run_benchmark(tmp_path, tmp_path, ("digits", "deit_small"), (1,), seconds, None)

    with pytest.raises(KeyboardInterrupt):
        run(1.0)
    assert measured == ["digits"] and not (tmp_path / "serving.csv").exists()
    ended = False
    run(1.0)
    assert measured == ["digits", "deit_small"]
    speeds = [float(row["value"]) for row in read_rows(tmp_path / "serving.csv") if row["figure"] == "images_per_s"]
    assert sorted(set(speeds)) == [101.0, 102.0]
    run(1.0)  # what was written is done with
    assert measured == ["digits", "deit_small"] * 2
    ended = True
    with pytest.raises(KeyboardInterrupt):
        run(1.0)
    ended = False
    run(2.0)  # another question than the one that was ended
    assert measured[-3:] == ["digits", "digits", "deit_small"]
