"""Top-1 of what is deployed: the file in its runtime, on the run's own test images."""

from pathlib import Path

import numpy as np
import pytest

import lowpass.export.evaluate
from lowpass.export.artefacts import export_run, open_session
from lowpass.export.evaluate import evaluate_deployed, logits_of_part, runnable_engines
from lowpass.export.options import ExportOptions
from lowpass.export.runtimes.session import Images, Session, logits_of
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


class Static:
    """A runtime for batches of eight alone."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def load(self, images: Images) -> None:
        assert len(images) == 8
        self.session.load(images)

    def run(self) -> None:
        self.session.run()

    def logits(self) -> Images:
        return self.session.logits()


def test_the_last_batch_may_be_smaller_than_an_engine_takes(slim_run: Path) -> None:
    session = Static(open_session("pytorch", slim_run, "fp32"))
    images = np.random.default_rng(0).standard_normal((8, 3, 32, 32), np.float32)
    whole = logits_of(session, images)
    np.testing.assert_allclose(logits_of_part(session, images[:3], 8), whole[:3], atol=1e-5)
    np.testing.assert_allclose(logits_of_part(session, images, 8), whole, atol=1e-5)


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
