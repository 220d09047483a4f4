"""What `lowpass doctor` says of ONNX Runtime's two packages of one name."""

import onnxruntime
import pytest
from command_line import answer

import lowpass.export.runtimes.onnx_packages as packages
from lowpass.cli import main
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.registry import missing
from lowpass.pipeline.base.errors import RunError

CPU, GPU = {"onnxruntime": "1.32.0"}, {"onnxruntime-gpu": "1.31.1"}


def told(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], providers: tuple[str, ...], obstacle: str | None = None
) -> list[str]:
    monkeypatch.setattr(packages, "installed_packages", lambda: installed)
    monkeypatch.setattr(packages, "available_providers", lambda: providers)
    monkeypatch.setattr(packages, "cuda_obstacle", lambda: obstacle)
    return packages.onnxruntime_problems()


def test_one_package_that_works_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, CPU, ("CPUExecutionProvider",), "never asked") == []
    assert told(monkeypatch, GPU, ("CUDAExecutionProvider", "CPUExecutionProvider")) == []


def test_both_packages_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    (said,) = told(monkeypatch, CPU | GPU, ("CPUExecutionProvider",))
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed" in said and "last installed wins" in said
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in said


def test_cuda_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    (said,) = told(monkeypatch, GPU, providers, "libcublasLt.so.13: cannot open shared object file")
    assert "libcublasLt.so.13" in said and "pip install 'onnxruntime-gpu[cuda,cudnn]'" in said
    (said,) = told(monkeypatch, GPU, providers, "libcuda.so.1: cannot open shared object file")
    assert "driver" in said and "pip install" not in said


def test_what_an_uninstalled_twin_leaves_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip removes the files that both brought: an empty package is left, which imports."""
    monkeypatch.setattr(packages, "installed_packages", lambda: GPU)
    monkeypatch.delattr(onnxruntime, "get_available_providers")
    (said,) = packages.onnxruntime_problems()
    assert "broken" in said and said.endswith("pip install onnxruntime-gpu")
    assert "broken" in (missing("onnxruntime") or "") and "pip install onnxruntime-gpu" in (
        missing("onnxruntime-cuda") or ""
    )


def test_the_library_is_loaded_to_find_out() -> None:
    obstacle = packages.cuda_obstacle()
    if "CUDAExecutionProvider" not in packages.available_providers():
        assert obstacle is not None and "libonnxruntime_providers" in obstacle


def test_cuda_is_preloaded_once_quietly_and_for_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def preload() -> None:
        calls.append(1)
        print("Failed to load libcublasLt.so.13")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    packages.preload.cache_clear()
    for provider, count in (("CPU", 0), ("CUDA", 1), ("Tensorrt", 1)):
        with pytest.raises(RunError):
            OnnxRuntime(b"no model", provider)
        assert len(calls) == count
    packages.preload.cache_clear()
    monkeypatch.delattr(onnxruntime, "preload_dlls")  # as before 1.21
    packages.preload()
    packages.preload.cache_clear()
    assert capsys.readouterr().out == ""


def test_doctor_tells_problems_to_people_and_scripts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "installed_packages", lambda: CPU | GPU)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert not ended.value.code
    assert "problem: onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1" in capsys.readouterr().out
    found = answer(capsys, "doctor")
    assert len(found["problems"]) == 1 and found["threads"]["torch"] >= 1 and "driver" in found["gpu_state"]
