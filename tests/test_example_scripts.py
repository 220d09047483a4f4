"""The examples run, and print what their headings say."""

import logging
import re
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from scripts import ROOT, ran

import lowpass.benchmarks.latency.target
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.search.latency_table import LatencyTable

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
