"""INT8: accurate on real images, accepted by ONNX Runtime, OpenVINO and TensorRT, and INT8 where it says so."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import lowpass.export.onnx.quantize
from lowpass.benchmarks.peers.tome import tome
from lowpass.export.artefacts import open_session
from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.export import export as export_verified
from lowpass.export.onnx.file import onnx_path, read_metadata, serialise
from lowpass.export.onnx.quantize import Quantization, linear_layers, quantize, without_attention_nodes
from lowpass.export.onnx.trace import to_onnx, trace
from lowpass.export.options import ExportOptions
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.session import logits_of
from lowpass.export.tensorrt.plan import build
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.images import quantization_batches, verification_batches
from tests.conftest import MakeViT

INT8 = ExportOptions(precision="int8", profile=BatchProfile.parse("1:2:4"))


@pytest.fixture(scope="module")
def images(tuned_run: Path) -> Batches:
    return verification_batches(tuned_run, None)[0]


@pytest.fixture(scope="module")
def quantization(tuned_run: Path) -> Quantization:
    return Quantization(*quantization_batches(tuned_run, None))


@pytest.fixture(scope="module")
def unjudged(quantization: Quantization) -> Quantization:
    """Nothing is left out, which takes a tenth of the time."""
    return Quantization(quantization.calibration)


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


@pytest.mark.parametrize("dense", [False, True])
def test_agrees_on_real_images(tuned_run: Path, images: Batches, quantization: Quantization, dense: bool) -> None:
    done = export_verified(tuned_run, INT8, images, dense=dense, calibration=quantization)
    assert done.images == 1000 and done.same_top1 >= 99
    file = onnx_path(tuned_run, "int8", dense)
    left_out = json.loads(read_metadata(file)["left_out"])
    model = onnx.load(file)
    plain = without_attention_nodes(to_onnx(SlimViT.load(tuned_run), INT8))
    layers = linear_layers(plain)
    assert len(layers) == 4 * 6 + 1 and len(left_out) < len(layers) / 2
    made_by = producers(model)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    narrow = set()
    for node in model.graph.node:
        if node.op_type == "MatMul" and (weights := made_by.get(node.input[1])) is not None:
            if weights.op_type != "DequantizeLinear":
                continue  # a product of two activations
            narrow.add(node.name)
            assert made_by[node.input[0]].op_type == "DequantizeLinear"
            matrix, scale, zero = (constants[name] for name in weights.input)
            assert matrix.dtype == np.int8 and scale.shape == (matrix.shape[1],)  # per output channel
            assert not zero.any()  # symmetric, as TensorRT demands
    assert narrow == set(layers) - set(left_out)
    # OpenVINO reads the same file.
    batch = images[0][0].numpy()
    wanted = logits_of(OnnxRuntime(file.read_bytes()), batch).argmax(-1)
    assert (logits_of(open_session("openvino", tuned_run, "int8", dense), batch).argmax(-1) == wanted).mean() >= 0.98


@pytest.mark.slow
def test_tensorrt_accepts_it(tuned_run: Path, images: Batches, unjudged: Quantization) -> None:
    export_verified(tuned_run, INT8, images, made_images=True, calibration=unjudged)
    assert build(tuned_run, "int8", "tensorrt-rtx").stat().st_size > 0


@pytest.mark.slow
def test_same_images_same_bytes(tuned_run: Path, quantization: Quantization) -> None:
    few = Quantization(quantization.calibration, quantization.judging[:1])
    assert serialise(tuned_run, INT8, False, few) == serialise(tuned_run, INT8, False, few)


@pytest.mark.slow
def test_pixels(tuned_run: Path, images: Batches, quantization: Quantization) -> None:
    asked = INT8.model_copy(update={"input": "uint8"})
    few = Quantization(quantization.calibration, quantization.judging[:2])
    assert export_verified(tuned_run, asked, images, calibration=few).same_top1 >= 99


@pytest.mark.slow
def test_layers_left_out_are_as_they_were(
    tuned_run: Path, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar that cannot be met leaves out every layer, one by one; what remains is the FP32 model."""
    monkeypatch.setattr(lowpass.export.onnx.quantize, "JUDGED_TOP1", 101.0)
    plain = to_onnx(SlimViT.load(tuned_run), INT8)
    few = Quantization(quantization.calibration[:1], quantization.judging[:1])
    model, left_out = quantize(plain, few)
    assert sorted(left_out) == sorted(linear_layers(without_attention_nodes(plain)))
    assert "DequantizeLinear" not in {node.op_type for node in model.graph.node}
    batch = quantization.judging[0]
    both = [logits_of(OnnxRuntime(graph.SerializeToString()), batch) for graph in (plain, model)]
    np.testing.assert_allclose(*both, atol=1e-4)


@pytest.mark.slow
def test_the_dearest_layer_goes_first(
    tuned_run: Path, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer gets a weight no INT8 scale fits: it is found and left out, and top-1 holds again."""
    slim = SlimViT.load(tuned_run)
    weight = slim.blocks[3].mlp.fc2.weight.data
    weight *= 1e-3
    weight[:, 0] = 0.0
    slim.blocks[3].mlp.fc1.bias.data[0] = 1e5  # one activation so large that all others round to nothing
    slim.blocks[3].mlp.fc2.weight.data[:] = weight * 1e3
    plain = to_onnx(slim, INT8)
    _, nothing = quantize(plain, Quantization(quantization.calibration))
    _, left_out = quantize(plain, Quantization(quantization.calibration, quantization.judging[:4]))
    assert nothing == [] and left_out[0] == "blocks.3.mlp.fc2.MatMul"


def test_without_images_it_is_refused(tuned_run: Path) -> None:
    with pytest.raises(ValueError, match="calibrate"):
        serialise(tuned_run, INT8)


def test_attention_written_out_is_the_same(make_vit: MakeViT) -> None:
    """ToMe's attention too, which has a mask and leaves the scale to ONNX's default."""
    vit = make_vit(num_heads=2, embed_dim=32)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 16, 16), np.float32)
    for module in (vit, tome(vit, 3), SlimViT.from_timm(vit)):
        model = trace(module, torch.zeros(2, 3, 16, 16))
        plain = without_attention_nodes(model)
        assert any(node.op_type == "Attention" for node in model.graph.node)
        assert not any(node.op_type == "Attention" for node in plain.graph.node)
        both = [logits_of(OnnxRuntime(graph.SerializeToString()), pixels) for graph in (model, plain)]
        np.testing.assert_allclose(*both, atol=1e-5)
