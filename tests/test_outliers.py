"""Outliers behind a norm move into the weights that read it: the same function, and less lost in 8 bits."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lowpass.export.onnx.attention_nodes import without_attention_nodes
from lowpass.export.onnx.outliers import fold_outliers
from lowpass.export.onnx.quantize import Quantization, quantize
from lowpass.export.onnx.quantize_half import quantize_half
from lowpass.export.onnx.rounding import LARGEST
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.session import Images, logits_of
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.images import quantization_batches


@pytest.fixture(scope="module")
def calibration(tuned_run: Path) -> list[Images]:
    return quantization_batches(tuned_run, None)[0][:2]


def with_outliers(run: Path) -> SlimViT:
    """The same function, with a channel behind every second norm 64 times as large."""
    slim = SlimViT.load(run)
    for block in slim.blocks:
        block.norm2.weight.data[7] *= 64
        block.norm2.bias.data[7] *= 64
        block.mlp.fc1.weight.data[:, 7] /= 64
    return slim


def logits(model: onnx.ModelProto, images: Images) -> Images:
    return logits_of(OnnxRuntime(model.SerializeToString()), images)


@pytest.mark.parametrize("precision", ["int8", "int8-fp16"])
def test_the_function_stays(tuned_run: Path, calibration: list[Images], precision: Precision) -> None:
    plain = without_attention_nodes(to_onnx(with_outliers(tuned_run), ExportOptions(precision=precision)))
    folded = fold_outliers(plain, calibration, LARGEST)
    moved = [tensor.name for tensor in folded.graph.initializer if tensor.name.endswith(".folded")]
    assert any("norm2" in name for name in moved) and any("fc1" in name for name in moved)
    onnx.checker.check_model(folded, full_check=True)
    # Powers of two round nothing but what FP16 has no normal number for; a runtime may sum in another order: a step of
    # FP16 at the largest logit, a hundredth of that in FP32.
    wanted = logits(plain, calibration[0])
    step = np.abs(wanted).max() * 2.0**-10
    atol = step / 100 if precision == "int8" else step
    np.testing.assert_allclose(logits(folded, calibration[0]), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("precision", ["int8", "int8-fp16"])
def test_outliers_cost_nothing(tuned_run: Path, calibration: list[Images], precision: Precision) -> None:
    errors = []
    for slim in (SlimViT.load(tuned_run), with_outliers(tuned_run)):
        model, quantization = to_onnx(slim, ExportOptions(precision=precision)), Quantization(calibration)
        narrow, _ = (
            quantize(model, quantization) if precision == "int8" else quantize_half(model, quantization, precision)
        )
        errors.append(np.square(logits(narrow, calibration[1]) - logits(model, calibration[1])).mean() ** 0.5)
    assert errors[1] < 1.5 * errors[0]


def graph_of(*nodes: onnx.NodeProto, outputs: tuple[str, ...]) -> onnx.ModelProto:
    """Norm, and whatever reads it; channel 2 is an outlier."""
    scale, weight = np.array([1, 1, 50, 1], np.float32), np.ones((4, 4), np.float32)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("LayerNormalization", ["images", "scale"], ["normed"], name="norm"), *nodes],
        "graph",
        [value("images", TensorProto.FLOAT, ["batch", 3, 4])],
        [value(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


PRODUCT = helper.make_node("MatMul", ["normed", "weight"], ["logits"], name="product")
ROWS: list[NDArray[np.float32]] = [np.random.default_rng(0).standard_normal((8, 3, 4), np.float32)]


def test_only_what_products_alone_read_is_changed() -> None:
    residual = helper.make_node("Add", ["normed", "logits"], ["sum"], name="residual")
    alone, shared, read = (
        graph_of(PRODUCT, outputs=("logits",)),
        graph_of(PRODUCT, residual, outputs=("sum",)),
        graph_of(PRODUCT, outputs=("logits", "normed")),
    )
    assert fold_outliers(alone, ROWS, 127) != alone
    assert fold_outliers(shared, ROWS, 127) == shared and fold_outliers(read, ROWS, 127) == read
