"""INT8 and FP8 with FP16 around, for TensorRT: as accurate as INT8 for CPUs, and in the precision it says."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from lowpass.export.artefacts import export_run, open_session
from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.file import onnx_path, read_metadata
from lowpass.export.onnx.quantize_half import layers_of_all_tokens
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.session import logits_of
from lowpass.export.tensorrt.plan import build, load_layers
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.images import verification_batches

PRECISIONS: tuple[Precision, ...] = ("int8-fp16", "fp8")
MOST_LEFT_OUT = 0.6  # of the layers


@pytest.mark.parametrize("precision", PRECISIONS)
def test_digits(tuned_run: Path, precision: Precision) -> None:
    """Top-1 on the test images within 0.3 points of FP32; Q/DQ in FP16 around every layer that reads all tokens."""
    done = export_run(tuned_run, ExportOptions(precision=precision, profile=BatchProfile.parse("1")))
    assert done.images == 1000 and done.same_top1 >= 99
    batches, _ = verification_batches(tuned_run, None)
    session, fp32 = open_session("onnxruntime", tuned_run, precision), SlimViT.load(tuned_run)
    right = np.zeros(2)
    for images, labels in batches:
        with torch.inference_mode():
            expected = fp32(images).argmax(-1)
        got = logits_of(session, images.numpy()).argmax(-1)
        right += [int((expected == labels).sum()), int((got == labels.numpy()).sum())]
    assert abs(right[0] - right[1]) <= 3

    file = onnx_path(tuned_run, precision)
    model, left_out = onnx.load(file), json.loads(read_metadata(file)["left_out"])
    layers = layers_of_all_tokens(to_onnx(fp32, ExportOptions(precision=precision)))
    assert len(layers) == 4 * 5 + 1 and len(left_out) < MOST_LEFT_OUT * len(layers)
    made_by = {output: node for node in model.graph.node for output in node.output}
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    narrow = onnx.TensorProto.INT8 if precision == "int8-fp16" else onnx.TensorProto.FLOAT8E4M3FN
    for node in model.graph.node:
        if node.name in layers and node.name not in left_out:
            read, weight = (made_by[name] for name in node.input)
            assert read.op_type == weight.op_type == "DequantizeLinear"
            assert kinds[weight.input[0]] == narrow
            assert kinds[weight.input[1]] == kinds[read.input[1]] == onnx.TensorProto.FLOAT16

    (layers_at_one,) = load_layers(build(tuned_run, precision, "tensorrt-rtx"))
    in_eight_bits = [k for k in layers_at_one.kernels if k.kind == "gemm" and k.computes_in in ("Int8", "FP8")]
    assert len(in_eight_bits) == len(layers) - len(left_out)
