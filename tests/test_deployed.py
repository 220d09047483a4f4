"""Top-1 of what is deployed: the file in its runtime, on the run's own test images."""

from pathlib import Path

import pytest

import lowpass.export.evaluate
from lowpass.export.artefacts import export_run
from lowpass.export.evaluate import evaluate_deployed, runnable_engines
from lowpass.export.options import ExportOptions
from lowpass.export.tensorrt.plan import build, plan_path
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.run.evaluate import evaluate_run


def test_files_score_as_pytorch_does(slim_run: Path) -> None:
    wanted = evaluate_run(slim_run, None).slim.top1
    export_run(slim_run, ExportOptions())
    done = evaluate_deployed(slim_run, "onnxruntime")
    assert done.images == 1000 and done.precision == "fp32" and done.top1 == wanted
    export_run(slim_run, ExportOptions(input="uint8"))  # pixels: the file normalises them
    assert evaluate_deployed(slim_run, "onnxruntime").top1 == pytest.approx(wanted, abs=0.2)
    with pytest.raises(InputError, match="run `lowpass export"):
        evaluate_deployed(slim_run, "onnxruntime", "int8")


def test_engines_are_measured_where_they_can_run(slim_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_run(slim_run, ExportOptions(precision="fp16"))
    build(slim_run, "fp16", "tensorrt-rtx")
    monkeypatch.setattr(lowpass.export.evaluate, "missing", lambda _: "it needs an NVIDIA GPU to run on")
    assert runnable_engines(slim_run) == []
    installed = {"tensorrt-rtx": None}
    monkeypatch.setattr(lowpass.export.evaluate, "missing", lambda flavour: installed.get(flavour, "not installed"))
    assert runnable_engines(slim_run) == [("tensorrt-rtx", "fp16")]
    plan_path(slim_run, "fp16").write_bytes(b"of another day")
    assert runnable_engines(slim_run) == []
