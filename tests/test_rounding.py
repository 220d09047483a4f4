"""INT8 fitted to inputs: weights whose errors cancel on them, and ranges that clip what few of them reach."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lowpass.export.onnx.quantize
from lowpass.export.onnx.quantize import Quantization, quantize
from lowpass.export.onnx.rounding import ACTIVATION, LARGEST, SHARES, best_share, compensated
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.options import ExportOptions
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.session import logits_of
from lowpass.pipeline.model.slim_vit import SlimViT
from tests.conftest import MakeViT


def layer(seed: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Weights [inputs, outputs], and the scale of each output."""
    weight = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(seed))
    return weight, weight.abs().amax(0) / LARGEST


@given(st.integers(0, 2**31), st.integers(2, 300), st.integers(1, 20), st.integers(1, 8))
def test_errors_on_correlated_inputs_are_smaller(seed: int, inputs: int, outputs: int, rank: int) -> None:
    weight, scale = layer(seed, inputs, outputs)
    rng = torch.Generator().manual_seed(seed + 1)
    rows = torch.randn(400, rank, generator=rng) @ torch.randn(rank, inputs, generator=rng)
    rows += 0.1 * torch.randn(400, inputs, generator=rng)
    rounded = compensated(weight, scale, rows.T @ rows)
    nearest = (weight / scale).round()
    assert torch.equal(rounded, rounded.round()) and rounded.abs().max() <= LARGEST

    def error(values: Tensor) -> float:
        return float((rows.double() @ (values * scale - weight).double()).square().sum())

    # Where the first channel that is rounded is all that the others could make up for, chance decides.
    assert error(rounded) < (0.5 if inputs > 50 else 1.2) * error(nearest)


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 20))
def test_inputs_without_correlation_leave_nothing_to_make_up_for(seed: int, inputs: int, outputs: int) -> None:
    weight, scale = layer(seed, inputs, outputs)
    powers = torch.rand(inputs, generator=torch.Generator().manual_seed(seed)) + 0.1
    torch.testing.assert_close(compensated(weight, scale, powers.diag()), (weight / scale).double().round())


def test_inputs_that_are_never_there_do_no_harm() -> None:
    weight, scale = layer(0, 5, 3)
    assert torch.equal(compensated(weight, scale, torch.zeros(5, 5)), (weight / scale).double().round())


@given(st.integers(0, 2**31), st.floats(1.3, 3))
def test_rare_values_are_clipped_and_frequent_ones_are_not(seed: int, tail: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 8, generator=rng)
    even = 2 * torch.rand(500, 16, generator=rng) - 1
    assert best_share(even, weight, even.abs().max() / ACTIVATION) == 1
    rare = torch.randn(500, 16, generator=rng)
    rare[0, 0] = tail * rare.abs().max()  # alone, in a channel that the outputs hardly read
    weight[0] /= 100
    scale = rare.abs().max() / ACTIVATION
    share = best_share(rare, weight, scale)
    assert share in SHARES[1:]
    seen = (rare / scale / share).round().clamp(-ACTIVATION - 1, ACTIVATION) * scale * share
    whole = (rare / scale).round() * scale
    assert ((seen - rare) @ weight).square().sum() < ((whole - rare) @ weight).square().sum()


def test_a_graph_is_nearer_to_fp32(make_vit: MakeViT, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = to_onnx(SlimViT.from_timm(make_vit(depth=4, img_size=32)).eval(), ExportOptions(precision="int8"))
    rng = np.random.default_rng(0)
    coarse = rng.standard_normal((96, 3, 4, 4), np.float32)  # smooth, as photographs are
    images = coarse.repeat(8, 2).repeat(8, 3) + rng.standard_normal((96, 3, 32, 32), np.float32) / 10

    def logits(content: bytes) -> np.ndarray:
        return logits_of(OnnxRuntime(content), images[64:])

    def error() -> float:
        int8, _ = quantize(model, Quantization([images[:64]]))
        return float(np.square(logits(int8.SerializeToString()) - logits(model.SerializeToString())).mean())

    made_up_for = error()
    monkeypatch.setattr(lowpass.export.onnx.quantize, "fit_to_inputs", lambda *_: None)
    assert made_up_for < error()
