"""The latency benchmark: fair turns, sound figures, and nothing timed that is not the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

import lowpass.benchmarks.latency.compare
import lowpass.benchmarks.latency.timing
from lowpass.benchmarks.latency.compare import benchmark, compare
from lowpass.benchmarks.latency.machine import as_text, describe
from lowpass.benchmarks.latency.timing import CHECKED, ROUNDS, check_logits, interleaved
from lowpass.benchmarks.speed.__main__ import parse_engines
from lowpass.export.batch import parse_batches
from lowpass.export.runtimes.registry import parse_runtimes
from lowpass.export.runtimes.session import Images
from lowpass.pipeline.base.errors import InputError, RunError


class _Named:
    """A session that only writes down its turns."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name, self.turns = name, turns

    def load(self, images: Images) -> None: ...

    def run(self) -> None:
        self.turns.append(self.name)

    def logits(self) -> Images:
        return np.zeros((1, 1), np.float32)


def test_rounds_take_turns() -> None:
    turns: list[str] = []
    timed = interleaved({name: _Named(name, turns) for name in ("dense", "slim")}, seconds=1e-9)
    assert {name: len(rounds) for name, rounds in timed.items()} == {"dense": ROUNDS, "slim": ROUNDS}
    measured = turns[4:]  # after two runs each to warm up
    assert measured[:4] == ["dense", "slim", "slim", "dense"] and len(measured) == 2 * ROUNDS
    few = interleaved({"dense": _Named("dense", [])}, seconds=1e-9, least=3)  # a run takes longer than that
    many = interleaved({"dense": _Named("dense", [])}, seconds=0.01, least=3)
    assert (len(few["dense"]), len(many["dense"])) == (3, ROUNDS)


class _Off:
    """A session of `model` whose logits are off where `wrong` says, by the place of an image among all that it saw."""

    def __init__(self, model: nn.Module, wrong: Callable[[int], bool], by: float = 1.0) -> None:
        self.model, self.wrong, self.by, self.seen = model, wrong, by, 0

    def load(self, images: Images) -> None:
        self.images = torch.from_numpy(images)

    def run(self) -> None: ...

    def logits(self) -> Images:
        with torch.inference_mode():
            logits = self.model(self.images).numpy()
        for image in range(len(logits)):
            logits[image] += self.by * self.wrong(self.seen)
            self.seen += 1
        return cast(Images, logits)


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_a_few_ties_refuse_no_session(batch: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()
    images = torch.randn(batch, 3, 4, 4).numpy()
    for wrong in (lambda _: False, lambda image: image % 5 == 0):
        session = _Off(model, wrong)
        check_logits(session, model, images, 0.1)
        assert session.seen >= CHECKED and torch.equal(session.images, torch.from_numpy(images))
    some = [_Off(model, lambda _: True), _Off(model, lambda image: image % 4 == 3)]  # the last of each batch of four
    for session in (*some, _Off(model, lambda image: image == 0, np.nan)):
        with pytest.raises(RunError, match="differ from PyTorch"):
            check_logits(session, model, images, 0.1)


def test_figures() -> None:
    timed = {"dense": [[4.0, 4.0, 10.0]] * 10, "slim": [[2.0, 2.0, 2.0]] * 9 + [[8.0, 8.0, 8.0]]}
    one = compare(timed, batch=8, saved=2.5)
    assert one.dense.p50_ms == 4 and one.dense.p99_ms == 10 and one.dense.runs == 30
    assert one.dense.images_per_s == 2000 and one.slim.images_per_s == 4000
    assert one.speedup == 2 and one.efficiency == 0.8  # the one bad round does not move the median


@pytest.mark.slow
def test_of_a_run(slim_run: Path) -> None:
    done = benchmark(slim_run, batches=(1, 3), seconds=0.05)
    written = json.loads((slim_run / "benchmark.json").read_text())
    assert written == done.model_dump(mode="json")
    for runtime in ("pytorch", "onnxruntime", "openvino"):
        assert set(written["runtimes"][runtime]["batches"]) == {"1", "3"}
    for name, result in done.runtimes.items():
        assert (result.not_measured is None) == (done.machine.runtimes[name] is None)
        for one in result.batches.values():
            assert 0 < one.slim.p50_ms <= one.slim.p90_ms <= one.slim.p99_ms
            assert one.speedup_quartiles[0] <= one.speedup <= one.speedup_quartiles[1]
    table = (slim_run / "benchmark.md").read_text()
    assert "onnxruntime fp32 | 3 |" in table and "not measured" in table


def test_another_models_session_is_not_timed(slim_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = lowpass.benchmarks.latency.compare.open_session
    monkeypatch.setattr(
        lowpass.benchmarks.latency.compare,
        "open_session",
        lambda runtime, run, precision, dense: original(runtime, run, precision, True),
    )
    result = benchmark(slim_run, runtimes=("pytorch",), batches=(2,), seconds=0.05).runtimes["pytorch"]
    assert result.not_measured is not None and "logits differ" in result.not_measured and not result.batches


def test_options() -> None:
    assert parse_batches("1, 8,32") == (1, 8, 32)
    assert parse_runtimes("onnxruntime,pytorch") == ("onnxruntime", "pytorch")
    for text in ("", "0", "a", "1,-2", "1.5"):
        with pytest.raises(InputError, match="--batches"):
            parse_batches(text)
    with pytest.raises(InputError, match="no runtime 'tflite'"):
        parse_runtimes("pytorch,tflite")
    assert parse_engines("onnxruntime:int8, openvino:bf16") == [("onnxruntime", "int8"), ("openvino", "bf16")]
    for text in ("onnxruntime", "onnxruntime:bf16", "tflite:int8", ""):
        with pytest.raises(InputError, match="choose from"):
            parse_engines(text)


def test_doctor_names_every_runtime() -> None:
    machine = describe()
    text = as_text(machine)
    assert machine.cores >= 1 and machine.memory_gib > 0
    assert all(f"runs {name}" in text for name in machine.runtimes)
    assert machine.packages["torch"] in text
