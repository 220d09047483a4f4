"""Every precision of a run: what is measured, once."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load, save

from lowpass.benchmarks.real import precisions
from lowpass.benchmarks.real.precisions import measure_precisions
from lowpass.benchmarks.rows import Origin, Row
from lowpass.export.onnx.verify import VERIFICATION_FILE
from lowpass.pipeline.base.errors import InputError, RunError

ORIGIN = Origin("a machine", "python", "abc", "a command")


def last(run: Path, cache: Path) -> list[Row]:
    *_, rows = measure_precisions(run, cache, ORIGIN, ("fp16",))
    return rows


@pytest.mark.slow
def test_a_precision_is_measured_once(tuned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = last(tuned_run, tmp_path)
    assert all(row.origin == ORIGIN for row in rows)
    found = {(row.of["model"], row.figure): row.value for row in rows}
    noted = json.loads((tuned_run / VERIFICATION_FILE).read_text())
    tested = json.loads((tuned_run / "metrics.json").read_text())
    for model, file in (("dense", "dense.fp16.onnx"), ("slim", "model.fp16.onnx")):
        assert found[model, "images"] == 1000
        assert found[model, "same_top1"] == noted[file]["same_top1"] >= 99
        # All test images of the digits are verified on: as many are right as PyTorch has, but for those that differ.
        differ = 100 - noted[file]["same_top1"]
        assert abs(float(found[model, "top1"]) - tested[model]["top1"]) <= differ + 1e-9
        assert found[model, "largest_magnitude"] == noted[file]["largest_magnitude"] > 1

    monkeypatch.setattr(precisions, "export_run", lambda *_, **__: pytest.fail("measured again"))
    assert last(tuned_run, tmp_path) == rows
    weights = load((tuned_run / "slim.safetensors").read_bytes())
    (tuned_run / "slim.safetensors").write_bytes(save(weights | {"head.bias": weights["head.bias"] + 1e-3}))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        last(tuned_run, tmp_path)


def test_a_refusal_is_a_row(slim_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RunError("it overflows")

    monkeypatch.setattr(precisions, "export_run", refuse)
    assert [(row.figure, row.value) for row in last(slim_run, tmp_path)] == [("not_exported", "it overflows")] * 2


def test_what_there_is_not_is_refused(slim_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no precision 'fp4'; known are fp32"):
        next(measure_precisions(slim_run, tmp_path, ORIGIN, ("fp4",)))  # type: ignore[arg-type]
