"""The GPU suite on a machine without one: its order, its CUDA graphs with a stand-in, and what a failure costs."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lowpass.benchmarks.speed.measure
import lowpass.export.runtimes.pytorch
from lowpass.benchmarks.latency.gpu import GpuState, gpu_state, parsed
from lowpass.benchmarks.rows import read_rows
from lowpass.benchmarks.speed.__main__ import plan_of
from lowpass.benchmarks.speed.memory import peak_memory
from lowpass.benchmarks.speed.plans import Plan, dry_run, gpu, uncaptured
from lowpass.benchmarks.speed.suite import run_suite
from lowpass.export.runtimes.pytorch import Captured, Compute, PyTorch, PyTorchGraph, cuda_graph
from lowpass.export.runtimes.registry import missing
from lowpass.export.runtimes.session import Images, logits_of
from lowpass.pipeline.base.errors import InputError, RunError

ROOT = Path(__file__).parent.parent


def layer(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval()


def images(batch: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).standard_normal((batch, 3, 2, 2), np.float32)


class Recorded:
    """A capture that remembers how often it was asked, and replays as a CUDA graph does: without Python's part."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, compute: Compute) -> Captured:
        self.captures += 1
        again, output = uncaptured(compute)

        def replay() -> None:
            self.replays += 1
            again()

        return replay, output


def test_a_graph_is_captured_once_a_batch_size_and_replayed_on_what_is_loaded() -> None:
    module, capture = layer(), Recorded()
    session = PyTorchGraph(module, capture)
    for batch, seed, captures in ((2, 0, 1), (2, 1, 1), (3, 2, 2), (2, 3, 3)):
        seen = images(batch, seed)
        with torch.inference_mode():
            expected = module(torch.from_numpy(seen)).numpy()
        np.testing.assert_allclose(logits_of(session, seen), expected, atol=1e-6)
        assert capture.captures == captures
    assert capture.replays == 4


def test_the_graph_has_a_buffer_of_its_own() -> None:
    """What the caller does with his array after `load` is not what is run."""
    session, seen = PyTorchGraph(layer(), uncaptured), images(2)
    wanted = logits_of(session, seen).copy()
    seen += 1
    session.run()
    np.testing.assert_array_equal(session.logits(), wanted)


def test_a_capture_that_fails_is_no_graph_of_that_size() -> None:
    """Loading the same size again does not replay what was never captured."""
    attempts = iter([RunError("no"), None])

    def capture(compute: Compute) -> Captured:
        if (error := next(attempts)) is not None:
            raise error
        return uncaptured(compute)

    session = PyTorchGraph(layer(), capture)
    with pytest.raises(RunError, match="no"):
        session.load(images(2))
    assert logits_of(session, images(2)).shape == (2, 5)


def test_a_failed_capture_says_why_and_restores_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own context leaves the capturing stream behind when a capture fails."""
    runs: list[str] = []
    current = ["before"]

    class Graph:
        def __init__(self, graph: object) -> None:
            pass

        def __enter__(self) -> None:
            current[0] = "capturing"

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")

    before = SimpleNamespace(wait_stream=lambda other: None)
    cuda = {
        "current_stream": lambda: before,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "CUDAGraph": lambda: SimpleNamespace(replay=None),
        "stream": lambda stream: nullcontext(),
        "graph": Graph,
        "set_stream": lambda stream: current.__setitem__(0, "before" if stream is before else "other"),
    }
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)

    def compute() -> Tensor:
        runs.append(current[0])
        return torch.zeros(1)

    with pytest.raises(
        RunError, match="captured as a CUDA graph: RuntimeError: CUDA error: operation not permitted"
    ) as e:
        cuda_graph(compute)
    assert "Compile with" not in str(e.value)
    assert runs == ["before"] * 3 + ["capturing"]
    assert current == ["before"]

    def copying() -> Tensor:
        if compute() is not None and current[0] == "capturing":
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        return torch.zeros(1)

    with pytest.raises(RunError, match="Cannot copy between CPU and CUDA tensors"):
        cuda_graph(copying)
    assert current == ["before"]


def test_every_batch_size_is_compiled_or_none_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives up after 8 compilations of a code object, and runs the rest eager in silence."""
    compile_ = torch.compile
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(compile_, backend=counter))
    torch._dynamo.reset()
    session = PyTorch(layer(), compiled=True)
    for batch in range(2, 14):
        session.load(images(batch))
        session.run()
    assert counter.frame_count == 12
    monkeypatch.setattr(lowpass.export.runtimes.pytorch, "MOST_COMPILATIONS", 12)
    with pytest.raises(RunError, match=r"torch\.compile cannot run the model: FailOnRecompileLimitHit"):
        session.load(images(20))
    torch._dynamo.reset()


def test_without_an_nvidia_gpu_there_is_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing("pytorch-graph") == "it needs an NVIDIA GPU to run on"
    assert dry_run().reason_against(("pytorch-graph", "fp16")) is None
    with pytest.raises(InputError, match="--device cpu"):
        plan_of("gpu", None)
    with pytest.raises(InputError, match="--device is for"):
        plan_of("paper", "cpu")
    assert plan_of("gpu", "cpu") == ("gpu_dry_run", dry_run())


def test_what_matters_most_comes_first() -> None:
    plan = gpu()
    assert plan.models[0] == "deit_small" and plan.batches == (1, 8, 32, 128)
    assert plan.names == ("dense", "dense-exported", "lowpass", "evit", "tome")
    assert plan.engines[:3] == (("pytorch-graph", "fp16"), ("pytorch-graph", "bf16"), ("pytorch-compile", "fp16"))
    assert plan.limit_s == 500 and plan.capture is cuda_graph and plan.note is None
    assert not {"onnxruntime", "openvino"} & {runtime for runtime, _ in plan.engines}


class Session:
    """Takes no time and gives the right logits, unless it is told to fail."""

    def __init__(self, module: nn.Module, fails: Callable[[int, str], None]) -> None:
        self.module, self.fails = module, fails

    def load(self, images: Images) -> None:
        self.images = images
        self.fails(len(images), "load")

    def run(self) -> None:
        self.fails(len(self.images), "run")

    def logits(self) -> Images:
        with torch.inference_mode():
            return np.asarray(self.module(torch.from_numpy(self.images)))


def timed_with(
    fails: dict[str, Callable[[int, str], None]], monkeypatch: pytest.MonkeyPatch, out: Path, batches: tuple[int, ...]
) -> list[dict[str, str]]:
    """Rows of three candidates on stand-in sessions; those in `fails` do as it says."""

    def open_rival(rival: Any, runtime: object, precision: object, *rest: object) -> tuple[Session, None]:
        if rival.name == "evit" and "evit" in fails:
            fails["evit"](0, "open")
        return Session(rival.at("fp32"), fails.get(rival.name, lambda batch, what: None)), None

    monkeypatch.setattr(lowpass.benchmarks.speed.measure, "open_rival", open_rival)
    plan = Plan(("deit_tiny",), batches, (("pytorch", "fp32"),), ("dense", "lowpass", "evit"), 0.05)
    run_suite("gpu", out, plan)
    return read_rows(out / "speed_gpu.csv")


def of(rows: list[dict[str, str]], figure: str) -> set[tuple[str, str]]:
    return {(row["batch"], row["candidate"]) for row in rows if row["figure"] == figure}


@pytest.mark.slow
def test_a_failure_costs_its_candidate_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(batch: int, what: str) -> None:
        if batch == 2 and what == "load":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")

    def uncompilable(batch: int, what: str) -> None:
        if what == "open":
            raise torch._dynamo.exc.FailOnRecompileLimitHit("recompile limit")

    rows = timed_with({"lowpass": out_of_memory, "evit": uncompilable}, monkeypatch, tmp_path, (1, 2, 3))
    assert of(rows, "p50_ms") == {("1", "dense"), ("1", "lowpass"), ("2", "dense"), ("3", "dense")}
    (said,) = [row["value"] for row in rows if row["figure"] == "not_measured"]
    assert said == (
        "evit: FailOnRecompileLimitHit: recompile limit; "
        "lowpass: batch 2: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    )


@pytest.mark.slow
def test_one_that_fails_while_all_are_timed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter(range(10**9))

    def late(batch: int, what: str) -> None:
        if what == "run" and next(runs) > 10:
            raise RuntimeError("CUDA error: misaligned address")

    rows = timed_with({"evit": late}, monkeypatch, tmp_path, (1,))
    assert of(rows, "speedup") == {("1", "dense"), ("1", "lowpass")}
    assert [row["value"] for row in rows if row["figure"] == "not_measured"] == [
        "evit: batch 1: RuntimeError: CUDA error: misaligned address"
    ]


@pytest.mark.slow
def test_without_dense_there_are_times_and_no_speedups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def always(batch: int, what: str) -> None:
        raise RuntimeError("no")

    rows = timed_with({"dense": always}, monkeypatch, tmp_path, (1,))
    assert of(rows, "p50_ms") == {("1", "lowpass"), ("1", "evit")}
    assert not of(rows, "speedup") and not of(rows, "efficiency")


@pytest.mark.slow
def test_wrong_logits_are_seen_at_the_first_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "logits", lambda session: np.zeros((len(session.images), 1000), np.float32))
    with pytest.raises(RunError, match="nothing could be timed"):
        timed_with({}, monkeypatch, tmp_path, (3, 1))
    rows = read_rows(tmp_path / "speed_gpu.csv")
    (said,) = [row["value"] for row in rows if row["figure"] == "not_measured"]
    assert said.count("batch 3: its logits differ from PyTorch's by ") == 3


def test_what_was_measured_before_a_kill_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(batch: int, what: str) -> None:
        if batch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timed_with({"dense": killed}, monkeypatch, tmp_path, (1, 2))
    rows = read_rows(tmp_path / "speed_gpu.csv")
    assert of(rows, "p50_ms") == {("1", "dense"), ("1", "lowpass"), ("1", "evit")}


@pytest.mark.slow
def test_clocks_stand_beside_the_batch_they_were_read_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowpass.benchmarks.speed.measure, "gpu_state", lambda: GpuState(sm_clock_mhz=1755))
    rows = timed_with({}, monkeypatch, tmp_path, (1,))
    assert [(row["batch"], row["value"]) for row in rows if row["figure"] == "sm_clock_mhz"] == [("1", "1755")]


def test_no_child_measures_memory_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started"))
    for runtime in ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt", "tensorrt-rtx"):
        assert peak_memory(b"", runtime, "fp16", 8, (3, 224, 224)) is None  # type: ignore[arg-type]


def test_what_the_driver_tells_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "580.95.05, 1980, 1980, 2619, 700.00, [N/A]\n580.95.05, 345, 1980, 2619, 700.00, 30\n"
    assert parsed(told) == GpuState(
        driver="580.95.05", sm_clock_mhz=1980, max_sm_clock_mhz=1980, memory_clock_mhz=2619, power_limit_w=700.0
    )
    assert parsed("") == parsed("No devices were found\n") == GpuState()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for content, driver in ((f"printf '{told}'", "580.95.05"), ("exit 9", None)):
        program.write_text(f"#!/bin/sh\n{content}\n")
        program.chmod(0o755)
        assert gpu_state().driver == driver
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state() == GpuState()


WITHOUT = """
import sys
for name in ("accelerate", "datasets", "matplotlib", "openvino", "sklearn", "tensorrt", "tensorrt_rtx", "torch_pruning",
             "transformers", "tritonclient"):
    sys.modules[name] = None
import runpy
sys.argv[1:] = {arguments!r}
runpy.run_module("lowpass.benchmarks.speed", run_name="__main__")
"""


@pytest.mark.slow
def test_a_dry_run_needs_no_gpu_and_no_more_than_torch_timm_and_onnx(tmp_path: Path) -> None:
    engines = "pytorch-graph:fp32,pytorch-graph:bf16,tensorrt:fp16,onnxruntime-cuda:fp16"
    arguments = ["--suite", "gpu", "--device", "cpu", "--engines", engines, "--out", str(tmp_path)]
    code = WITHOUT.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "speed_gpu_dry_run.csv")
    assert rows[0]["figure"] == "note" and "no figure here says anything of a GPU" in rows[0]["value"]
    for precision in ("fp32", "bf16"):
        timed = [row for row in rows if (row["precision"], row["figure"]) == (precision, "speedup")]
        assert [row["candidate"] for row in timed] == list(gpu().names)
        assert {row["runtime"] for row in timed} == {"pytorch-graph"} and {row["batch"] for row in timed} == {"1"}
    reasons = {row["runtime"]: row["value"] for row in rows if row["figure"] == "not_measured"}
    assert set(reasons) == {"tensorrt", "onnxruntime-cuda"}
    assert (
        "matplotlib is not installed" in done.stderr and " s  deit_tiny: pytorch-graph bf16: measuring" in done.stderr
    )
