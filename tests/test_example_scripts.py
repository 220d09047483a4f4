"""The examples run, and those without lowpass give what lowpass gives."""

import ast
import importlib.util
import logging
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
import torch
from PIL import Image
from scripts import ROOT, ran

import lowpass
import lowpass.benchmarks.latency.target
import lowpass.pipeline.run.images
from lowpass.pipeline.data.datasets import transforms
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.search.latency_table import LatencyTable

BARE = ROOT / "examples" / "without_lowpass"
PERCENT = r"(\d+\.\d)%"


@pytest.mark.slow
def test_your_own_model(tmp_path: Path) -> None:
    said = ran("your_own_model.py", tmp_path)
    dense, slim, tuned = (
        (float(top1), int(macs.replace(",", ""))) for top1, macs in re.findall(rf"top-1 {PERCENT}, (\S+) MACs", said)
    )
    assert dense[0] > 85 and tuned[0] > 80 and slim[1] == tuned[1]
    assert slim[1] == pytest.approx(0.5 * dense[1], rel=0.02)


@pytest.mark.slow
def test_rivals(tmp_path: Path) -> None:
    said = ran("rivals.py", tmp_path)
    for criterion in ("obs", "lfs", "taylor", "magnitude"):
        assert re.search(rf"^{criterion} +{PERCENT} +{PERCENT}$", said, re.MULTILINE)
    for criterion in ("lfe-attention", "attention", "lfe"):
        assert re.search(rf"^{criterion} +{PERCENT}$", said, re.MULTILINE)
    assert len(re.findall(r"^random ", said, re.MULTILINE)) == 2


@pytest.mark.slow
def test_eight_bits(tmp_path: Path) -> None:
    said = ran("eight_bits.py", tmp_path)
    files = dict(re.findall(rf"^model\.(\S+)\.onnx: .* top-1 {PERCENT}, left out: .", said, re.MULTILINE))
    assert list(files) == ["fp32", "int8", "int8-fp16", "fp8"]
    (whole,) = re.findall(rf"^PyTorch in FP32: top-1 {PERCENT}$", said, re.MULTILINE)
    assert float(files["fp32"]) == float(whole) > 80
    assert all(abs(float(top1) - float(whole)) <= 3 for top1 in files.values())
    built = re.findall(r"^model\.(\S+)\.plan: kernels [1-9]\d* at batch 1:8:32, ", said, re.MULTILINE)
    assert built == ["int8-fp16", "fp8"]


@pytest.mark.slow
def test_transformers_to_triton(tmp_path: Path) -> None:
    """With the client without lowpass in the end."""
    said = ran("transformers_to_triton.py", tmp_path)
    assert "MACs: 0.50 of dense" in said and "deployed: version 1 of digits" in said
    labels = re.findall(r"^(\d): (0\.\d+)$", said, re.MULTILINE)
    assert len(labels) == 3 and labels[0][0] == "3"
    shares = [float(share) for _, share in labels]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 1.002


def by_macs(architecture: Architecture, runtime: str, precision: str, batch: int) -> LatencyTable:
    """A table as of a machine on which the dense model takes 10 ms, and every MAC as long as every other."""
    dense, ms = architecture.dense, 10 / architecture.macs()
    tokens = tuple(range(2, dense.num_tokens + dense.num_prefix_tokens + 1))
    rows, hidden = (1, 2 * dense.embed_dim), (1, dense.hidden)
    attention = tuple(tuple(ms * n * (2 * dense.embed_dim + n) * row for row in rows) for n in tokens)
    return LatencyTable(
        dense=dense,
        runtime=runtime,
        precision=precision,
        batch=batch,
        token_score=architecture.token_score,
        token_criterion=architecture.token_criterion,
        machine={},
        ends_ms=ms * dense.end_macs(),
        tokens=tokens,
        rows=rows,
        hidden=hidden,
        attention_ms=attention,
        mlp_ms=tuple(tuple(ms * dense.mlp_macs(n, width) for width in hidden) for n in tokens),
        selection_ms=tuple(ms * architecture.selection_macs(n) for n in tokens),
        last_ms=tuple((few + ms * dense.mlp_macs(2, dense.hidden), many) for few, many in attention),
    )


@pytest.mark.slow
def test_a_latency_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine whose times are MACs: real ones would make the outcome hang on what else runs here."""
    monkeypatch.setattr(lowpass.benchmarks.latency.target, "measure_table", by_macs)
    monkeypatch.setattr(
        lowpass.benchmarks.latency.target,
        "against_dense",
        lambda slim, dense, *_: (10.0, dense.macs() / slim.macs()),
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    level = logging.getLogger("lowpass").level
    try:
        names = runpy.run_path(str(ROOT / "examples" / "latency_target.py"))
    finally:
        logging.getLogger("lowpass").setLevel(level)
    run: Any = names["run"]
    said = capsys.readouterr().out
    assert "dense: 10.000 ms a batch of 32; target: 7.000 ms" in said and "block 2:" in said
    assert run.metrics.slim.macs / run.metrics.dense.macs == pytest.approx(0.7, abs=0.7 * 0.05)


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


def test_tensorrt_in_cpp_compiles() -> None:
    """Against CUDA's headers and a stand-in for TensorRT's, which no registry of packages has."""
    spec = importlib.util.find_spec("nvidia")
    assert spec is not None and spec.submodule_search_locations
    found = [Path(place) / "cu13" / "include" for place in spec.submodule_search_locations]
    includes = [f"-isystem{place}" for place in found if (place / "cuda_runtime_api.h").exists()]
    assert includes
    stand_in = f"-I{ROOT / 'tests' / 'data' / 'tensorrt'}"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", stand_in, *includes]
    done = subprocess.run([*command, BARE / "tensorrt_engine.cpp"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
