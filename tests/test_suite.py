"""The speed suite: all rivals at matched MACs, checked, timed and written down; what cannot run is said."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
from PIL import Image

import lowpass.benchmarks.latency.timing
import lowpass.benchmarks.speed.sessions
from lowpass.benchmarks.precision.gains import measure
from lowpass.benchmarks.rows import read_rows
from lowpass.benchmarks.speed.candidates import CANDIDATES, Candidate, candidates, uniform_width
from lowpass.benchmarks.speed.measured import Engine
from lowpass.benchmarks.speed.memory import peak_memory
from lowpass.benchmarks.speed.plans import Plan, gpu, paper
from lowpass.benchmarks.speed.result_rows import rows
from lowpass.benchmarks.speed.suite import run_suite
from lowpass.export.options import Precision
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.model.slim_vit import SlimViT


@pytest.fixture(scope="module", autouse=True)
def exported_once() -> Iterator[None]:
    """A file of the same weights serves two tests: candidates are drawn with a seed."""
    made = dict[tuple[str, Precision], bytes]()

    def exported(rival: Candidate, precision: Precision) -> bytes:
        if (rival.name, precision) not in made:
            made[rival.name, precision] = anew(rival, precision)
        return made[rival.name, precision]

    anew = lowpass.benchmarks.speed.sessions._exported
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowpass.benchmarks.speed.sessions, "_exported", exported)
        yield


@pytest.mark.parametrize("model", ["deit_tiny", "deit_small", "deit_base"])
def test_rivals_have_matched_macs(model: str) -> None:
    rivals = {rival.name: rival.macs for rival in candidates(model)}
    assert tuple(rivals) == CANDIDATES
    paper = {"deit_tiny": 0.7e9, "deit_small": 2.1e9, "deit_base": 7.5e9}[model]  # VTC-LFC, Table 1
    assert abs(rivals["lowpass"] - paper) < 0.05e9
    assert rivals["dense-exported"] == rivals["dense"]
    for name in set(rivals) - {"dense", "dense-exported", "lowpass"}:
        assert 0.9 < rivals[name] / rivals["lowpass"] < 1.05, name


def test_uniform_width_is_refused_where_there_is_none() -> None:
    architecture = SlimViT.from_timm(timm.create_model("deit_tiny_patch16_224", depth=1)).architecture
    with pytest.raises(InputError, match="uniform width"):
        uniform_width(architecture, 1)


KEYS = ("model", "runtime", "precision", "batch", "candidate")


@pytest.mark.slow
def test_a_suite_is_written(tmp_path: Path) -> None:
    engines: tuple[Engine, ...] = (("onnxruntime", "int8"), ("openvino", "bf16"), ("tensorrt-rtx", "fp16"))
    done = run_suite("gpu", tmp_path, Plan(("deit_tiny",), (1, 2), engines, ("dense", "lowpass"), 0.05))
    written = read_rows(tmp_path / "speed_gpu.csv")
    wanted = [(row.figure, str(row.value), *(str(value) for value in row.of.values())) for row in rows(done)]
    assert [(row["figure"], row["value"], *(row[key] for key in KEYS if row[key])) for row in written] == wanted
    for engine in done.models["deit_tiny"].engines:
        if engine.runtime == "tensorrt-rtx" and engine.not_measured:
            assert not engine.batches  # no GPU, and no figure in its place
            continue
        assert engine.not_measured is None, engine.not_measured
        assert set(engine.batches) == {1, 2}
        for figures in engine.batches.values():
            assert set(figures) == {"dense", "lowpass"}
            assert figures["dense"].efficiency == pytest.approx(1)
        assert engine.file_bytes["lowpass"] < engine.file_bytes["dense"]
        assert all(mib is not None and mib > 5 for mib in engine.peak_memory_mib.values())
    spreads = [(str(row.low or ""), str(row.high or "")) for row in rows(done)]
    assert [(row["low"], row["high"]) for row in written] == spreads
    assert {("onnxruntime", "int8"), ("openvino", "bf16")} <= {(row["runtime"], row["precision"]) for row in written}
    for figure in ("p50_ms", "p90_ms", "p99_ms", "speedup", "efficiency", "file_bytes", "peak_memory_mib", "macs"):
        assert figure in {row["figure"] for row in written}
    assert {"dense", "lowpass"} <= {row["candidate"] for row in written}
    assert Image.open(tmp_path / "speed_gpu_deit_tiny.png").size[0] > 500
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
def test_a_model_that_computes_something_else_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        lowpass.benchmarks.latency.timing,
        "logits_of",
        lambda session, images: np.zeros((len(images), 1000), np.float32),
    )
    with pytest.raises(RunError, match="nothing could be timed"):
        run_suite("paper", tmp_path, Plan(("deit_tiny",), (1,), (("pytorch", "fp32"),), ("dense",), 0.05))
    macs, reason = read_rows(tmp_path / "speed_paper.csv")
    assert macs["figure"] == "macs" and reason["figure"] == "not_measured" and "logits differ" in reason["value"]


def test_nothing_is_begun_out_of_time(tmp_path: Path) -> None:
    done = run_suite("gpu", tmp_path, Plan(("deit_tiny",), (1,), (("pytorch", "fp32"),), ("dense",), 0.05, limit_s=0))
    assert done.models["deit_tiny"].engines[0].not_measured == "out of time"


def test_missing_runtimes_are_named() -> None:
    plans = paper(), gpu()
    for runtime, reason in [(engine[0], plan.reason_against(engine)) for plan in plans for engine in plan.engines]:
        assert reason is None or runtime in reason or "NVIDIA GPU" in reason or "provider" in reason, (runtime, reason)


@pytest.mark.slow
def test_memory_is_what_the_model_adds() -> None:
    """A larger batch needs more, and a file that does not load has no figure."""
    kind = onnx.TensorProto.FLOAT
    weights = np.zeros((3 * 32 * 32, 1024), np.float32)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Flatten", ["images"], ["flat"]),
            onnx.helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "layer",
        [onnx.helper.make_tensor_value_info("images", kind, ["batch", 3, 32, 32])],
        [onnx.helper.make_tensor_value_info("logits", kind, ["batch", 1024])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 23)])
    content = model.SerializeToString()
    few, many = (peak_memory(content, "onnxruntime", "fp32", batch, (3, 32, 32)) for batch in (1, 8192))
    assert few is not None and many is not None and few > weights.nbytes / 2**20
    assert many > few + 8192 * 1024 * 4 / 2**20  # its logits at least
    assert peak_memory(b"no model", "onnxruntime", "fp32", 1, (3, 32, 32)) is None


@pytest.mark.slow
def test_precisions_are_timed_against_fp32() -> None:
    rivals = candidates("deit_tiny", ("dense", "lowpass"))
    [(batch, gains)] = measure(rivals, "onnxruntime", (2,), 0.05, {})
    assert batch == 2
    assert set(gains) == {"dense", "lowpass"}
    for precisions in gains.values():
        assert set(precisions) == {"fp32", "int8"} and precisions["fp32"].gain == 1
        assert precisions["int8"].gain > 0 and precisions["int8"].latency.runs >= 7
