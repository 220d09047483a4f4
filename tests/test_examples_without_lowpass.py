"""The examples without lowpass give what lowpass gives, as far as there are means to run them here."""

import ast
import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorrt_rtx
import torch
from PIL import Image
from scripts import ROOT, ran

import lowpass
import lowpass.pipeline.run.images
from lowpass.pipeline.data.datasets import transforms

BARE = ROOT / "examples" / "without_lowpass"


def imported(file: Path) -> set[str]:
    """The packages that a script imports."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[0] for name in [*plain, *(n.module or "" for n in nodes if isinstance(n, ast.ImportFrom))]}


def test_what_is_without_lowpass_is() -> None:
    files = sorted(BARE.glob("*.py"))
    assert len(files) == 3 and not [file for file in files if "lowpass" in imported(file)]


def test_onnx_runtime_gives_what_lowpass_gives(slim_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowpass.pipeline.run.images, "VERIFIED_IMAGES", 64)
    run = lowpass.Run(slim_run)
    file = run.export("fp32")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    noise.resize((90, 65), Image.Resampling.BICUBIC).save(tmp_path / "wide.png")
    _, prepared = transforms(run.architecture)
    for picture in (ROOT / "deploy" / "digit.png", tmp_path / "wide.png"):
        said = ran("without_lowpass/onnx_runtime.py", tmp_path, file, picture)
        with torch.inference_mode():
            shares = run.slim(prepared(Image.open(picture).convert("RGB"))[None]).softmax(-1)[0]
        best = shares.topk(3)
        told = [line.split(": ") for line in said.splitlines()]
        assert [name for name, _ in told] == [run.classes[index] for index in best.indices]
        assert [float(share) for _, share in told] == pytest.approx(best.values.tolist(), abs=2e-3)


def test_tensorrt_in_python_uses_names_that_are_there() -> None:
    """TensorRT-RTX has the API of TensorRT. Running it takes a GPU."""
    tree = ast.parse((BARE / "tensorrt_engine.py").read_text())
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    homes = {"trt": tensorrt_rtx, "engine": tensorrt_rtx.ICudaEngine, "context": tensorrt_rtx.IExecutionContext}
    checked = [(home, name) for variable, name in used if (home := homes.get(variable)) is not None]
    assert len(checked) >= 10 and all(hasattr(home, name) for home, name in checked)
    assert hasattr(tensorrt_rtx.Runtime, "deserialize_cuda_engine")


def headers(package: str, folder: str, name: str) -> Path:
    """The folder of a package with this header in it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    (found,) = {path for place in spec.submodule_search_locations if (path := Path(place) / folder / name).exists()}
    return found.parent


def test_tensorrt_in_cpp_compiles(tmp_path: Path) -> None:
    """Against the headers of TensorRT and of CUDA. Linking it takes TensorRT's library."""
    tensorrt = headers("kernel_lens", "include/tensorrt", "NvInfer.h")
    assert "TRT_MAJOR_ENTERPRISE 10" in (tensorrt / "NvInferVersion.h").read_text()
    includes = [f"-isystem{place}" for place in (tensorrt, headers("nvidia", "cu13/include", "cuda_runtime_api.h"))]
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *includes, "-c", "-o", tmp_path / "classify.o"]
    done = subprocess.run([*command, BARE / "tensorrt_engine.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "classify.o").stat().st_size > 0
