"""A Triton model repository says what it serves, and what is none is refused; no server runs here."""

from pathlib import Path

import pytest
from served import exported

from lowpass.cli import main
from lowpass.export.onnx.file import current_onnx
from lowpass.export.triton.config import parse_config
from lowpass.export.triton.repository import CONFIG_FILE, DeployOptions, deploy, serve_version, versions_of
from lowpass.export.triton.server import find_server
from lowpass.pipeline.base.errors import InputError


@pytest.mark.slow
def test_a_repository_says_what_it_serves(slim_run: Path, tmp_path: Path) -> None:
    exported(slim_run, "fp32")
    for backend in ("python", "onnxruntime"):
        done = deploy(slim_run, tmp_path / "repo", backend, DeployOptions(backend=backend))  # type: ignore[arg-type]
        config = parse_config((done.path / CONFIG_FILE).read_text(), "config")
        assert config.backend == backend and config.max_batch_size == 8
        assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
        assert config.dynamic_batching.max_queue_delay_microseconds > 0
        assert list(config.version_policy.specific.versions) == [1]
        assert len(config.model_warmup) == 3 and config.instance_group[0].count >= 1
        assert (done.path / "labels.txt").read_text().split() == [str(digit) for digit in range(10)]
        assert (done.path / "1" / "model.onnx").read_bytes() == current_onnx(slim_run, "fp32").read_bytes()
    with pytest.raises(InputError, match="already holds version 1"):
        deploy(slim_run, tmp_path / "repo", "python", DeployOptions(version=1))
    with pytest.raises(InputError, match="another backend"):
        deploy(slim_run, tmp_path / "repo", "python", DeployOptions(backend="onnxruntime"))
    with pytest.raises(InputError, match="no version before 1"):
        serve_version(tmp_path / "repo", "python")
    with pytest.raises(InputError, match="--name"):
        deploy(slim_run, tmp_path / "repo", "../up", DeployOptions())
    assert versions_of(tmp_path / "repo" / "python") == (1,)
    assert not list(tmp_path.rglob("*.part"))


def test_serve_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(tmp_path)])
    assert stop.value.code == 2 and "holds no model" in capsys.readouterr().err
    with pytest.raises(InputError, match="make triton"):
        find_server(tmp_path)
