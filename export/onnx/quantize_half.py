"""INT8 and FP8 for TensorRT: linear layers in 8 bits, FP16 around them, attention fused as in the FP16 file.

What `quantize` makes for CPUs has FP32 around its layers, for which TensorRT has no fused attention. Here the FP16
graph gets Q/DQ with FP16 scales, the one kind that leaves it FP16 (tried in TensorRT-RTX 1.7.1: FP32 scales are
refused). INT8 weights have a scale an output channel and 8 bits, rounded by GPTQ; FP8 (E4M3) ones a scale a tensor.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from lowpass.export.onnx.outliers import fold_outliers
from lowpass.export.onnx.quantize import Quantization, leave_out_until_top1_holds, linear_layers
from lowpass.export.onnx.rounding import Inputs, best_share, compensated, inputs_of
from lowpass.export.options import Precision
from lowpass.export.runtimes.session import as_input

LARGEST = {"int8-fp16": 127.0, "fp8": 448.0}  # that the type holds
SMALLEST_SCALE = 2.0**-14  # the smallest normal FP16: a channel of zeros has to have some scale


@dataclass(frozen=True)
class _Layer:
    """A product x [..., C] @ weight [C, K] of the graph."""

    node: onnx.NodeProto
    weight: NDArray[np.float16]


def quantize_half(
    model: onnx.ModelProto, images: Quantization, precision: Precision
) -> tuple[onnx.ModelProto, list[str]]:
    """The graph that `deployable` makes for FP16, its blocks' linear layers in 8 bits.

    The last block's layers of CLS alone stay FP16: a row at a time they are bound by kernels, and Q/DQ adds some.

    Args:
        model: the FP16 graph.
        images: to calibrate on, and to judge by which layers stay FP16.
        precision: `int8-fp16` or `fp8`.

    Returns:
        The model, and the names of the layers left in FP16 because top-1 did not hold with them.
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    calibration = [as_input(batch, metadata) for batch in images.calibration]
    folded = fold_outliers(model, calibration, LARGEST[precision])
    constants = {tensor.name: tensor for tensor in folded.graph.initializer}
    nodes = {node.name: node for node in folded.graph.node}
    layers = [
        _Layer(nodes[name], onnx.numpy_helper.to_array(constants[nodes[name].input[1]]))
        for name in layers_of_all_tokens(folded)
    ]
    seen = inputs_of(folded, list(dict.fromkeys(layer.node.input[0] for layer in layers)), calibration)
    everything = _with_qdq(folded, layers, seen, precision)
    return leave_out_until_top1_holds(
        model, everything, folded, [layer.node.name for layer in layers], images.judging, "FP16"
    )


def layers_of_all_tokens(model: onnx.ModelProto) -> list[str]:
    """The blocks' products in FP16 that read every token: of the last block with attention the first alone, and of
    those above it none."""
    half = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
    weights = {node.name: node.input[1] for node in model.graph.node if len(node.input) > 1}
    names = [name for name in linear_layers(model) if name.startswith("blocks.") and weights[name] in half]
    parts = {name: (int(name.split(".")[1]), name.split(".")[2]) for name in names}
    cuts = [number for number, part in parts.values() if part == "qkv"]  # `LastBlock`'s; others' are their attention's
    cut = min(cuts, default=math.inf)
    return [name for name, (number, part) in parts.items() if number < cut or (number == cut and part == "qkv")]


def _with_qdq(
    model: onnx.ModelProto, layers: Sequence[_Layer], seen: dict[str, Inputs], precision: Precision
) -> onnx.ModelProto:
    quantised = onnx.ModelProto()
    quantised.CopyFrom(model)
    graph = quantised.graph
    by_name = {layer.node.name: layer for layer in layers}
    ranged: dict[str, str] = {}  # what is read -> its Q/DQ copy
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.name in by_name:
            layer, read = by_name[node.name], node.input[0]
            if read not in ranged:
                together = [other.weight for other in layers if other.node.input[0] == read]
                scale = _range(seen[read], np.concatenate(together, 1), precision)
                nodes += _quantised_input(graph, read, scale, precision)
                ranged[read] = f"{read}.dequantised"
            nodes += _quantised_weight(graph, layer, seen[read], precision)
            node.input[0], node.input[1] = ranged[read], f"{node.name}.weight.dequantised"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return quantised


def _range(inputs: Inputs, weights: NDArray[np.float16], precision: Precision) -> float:
    """The step of what layers read: clipped where that leaves their outputs more exact. FP8 has a range to spare."""
    widest = float(inputs.rows.abs().max()) / LARGEST[precision]
    share = 1.0 if precision == "fp8" else best_share(inputs.rows, _wide(weights), torch.tensor(widest))
    return max(widest * share, SMALLEST_SCALE)


def _quantised_input(graph: onnx.GraphProto, read: str, scale: float, precision: Precision) -> Iterator[onnx.NodeProto]:
    names = [f"{read}.scale", f"{read}.zero"]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(scale, np.float16), names[0]))
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), _dtype(precision)), names[1]))
    narrow = f"{read}.quantised"
    yield onnx.helper.make_node("QuantizeLinear", [read, *names], [narrow], name=f"{narrow}.QuantizeLinear")
    wide = f"{read}.dequantised"
    yield onnx.helper.make_node("DequantizeLinear", [narrow, *names], [wide], name=f"{wide}.DequantizeLinear")


def _quantised_weight(
    graph: onnx.GraphProto, layer: _Layer, inputs: Inputs, precision: Precision
) -> Iterator[onnx.NodeProto]:
    weight = _wide(layer.weight)
    attributes: dict[str, Any] = {}
    if precision == "fp8":
        scales = (weight.abs().max() / LARGEST[precision]).clamp_min(SMALLEST_SCALE).half()
        values = (weight / scales.float()).clamp(-448, 448).numpy().astype(_dtype(precision))
    else:
        scales = (weight.abs().amax(0) / LARGEST[precision]).clamp_min(SMALLEST_SCALE).half()
        rounded = compensated(weight, scales.float(), inputs.products, largest=int(LARGEST[precision]))
        values = rounded.numpy().astype(np.int8)
        attributes["axis"] = 1
    stem = f"{layer.node.name}.weight"
    graph.initializer.append(onnx.numpy_helper.from_array(values, f"{stem}.quantised"))
    graph.initializer.append(onnx.numpy_helper.from_array(scales.numpy(), f"{stem}.scale"))
    yield onnx.helper.make_node(
        "DequantizeLinear",
        [f"{stem}.quantised", f"{stem}.scale"],
        [f"{stem}.dequantised"],
        name=f"{stem}.DequantizeLinear",
        **attributes,
    )


def _dtype(precision: Precision) -> Any:
    return ml_dtypes.float8_e4m3fn if precision == "fp8" else np.int8


def _wide(weights: NDArray[np.float16]) -> torch.Tensor:
    return torch.from_numpy(weights.astype(np.float32))
