"""INT8 by static Q/DQ in a form that both ONNX Runtime and TensorRT run fast, and what accuracy forbids left out.

Only the linear layers of the blocks become INT8: 85 to 95 % of the MACs. Their outputs stay FP32, so that ONNX Runtime
fuses each into one integer GEMM that writes floats, and LayerNorm, GELU, softmax and the residual sum stay as they
were; quantising those outputs too is what made INT8 slow on a slim model, whose small tensors gain least from it.
Products of two activations (attention) stay FP32 for the same reason, and so do the low-pass filter and the scores,
which decide which tokens are kept. Ranges and roundings are fitted to real inputs: `lowpass.export.onnx.rounding`.
"""

import math
import tempfile
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from lowpass.export.onnx.attention_nodes import without_attention_nodes
from lowpass.export.onnx.outliers import fold_outliers
from lowpass.export.onnx.rounding import LARGEST as WEIGHT
from lowpass.export.onnx.rounding import fit_to_inputs
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.session import Images, as_input, logits_of
from lowpass.pipeline.base.progress import logger, quiet, track

# Least share of the judging images (percent) whose top-1 must stay; above what an export is held to, on other images.
JUDGED_TOP1 = 99.5
RANKED_SHARE = 0.25  # of the judging images, on which layers are ranked: logits say more than top-1
LOWPASS = "lowpass"  # how the constant of LFE is named in the graph


@dataclass(frozen=True)
class Quantization:
    """What INT8 is made by: batches of normalised images [B, C, H, W]. Ranges of activations come from `calibration`;
    layers are left out until top-1 holds on `judging`. Without `judging` (random weights: top-1 says nothing) none is.
    """

    calibration: Sequence[Images]
    judging: Sequence[Images] = ()


def quantize(model: onnx.ModelProto, images: Quantization) -> tuple[onnx.ModelProto, list[str]]:
    """The graph that `deployable` makes for INT8, with INT8 linear layers: symmetric, weights per output channel in
    [-64, 64], so that every CPU computes them alike, activations per tensor.

    Returns:
        The model, and the names of the layers left in FP32 because top-1 did not hold with them.
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    calibration = [as_input(batch, metadata) for batch in images.calibration]
    plain = fold_outliers(without_attention_nodes(model), calibration, WEIGHT)
    layers = linear_layers(plain)
    everything = _with_qdq(plain, layers, calibration)
    fit_to_inputs(everything, plain, layers, calibration)
    return leave_out_until_top1_holds(model, everything, plain, layers, images.judging, "FP32")


def leave_out_until_top1_holds(
    model: onnx.ModelProto,
    everything: onnx.ModelProto,
    plain: onnx.ModelProto,
    layers: Sequence[str],
    judging: Sequence[Images],
    instead: str,
) -> tuple[onnx.ModelProto, list[str]]:
    """As many layers in 8 bits as top-1 allows.

    Args:
        model: what top-1 is held against.
        everything: the graph with all of `layers` in 8 bits.
        plain: the graph with none.
        layers: names of nodes of both.
        judging: batches of normalised images; without any nothing is left out.
        instead: what a layer that is left out computes in, for the log.

    Returns:
        The graph, and the names of the layers left out.
    """
    if not judging:
        return everything, []
    wanted = _logits(model, judging)

    def top1_kept(candidate: onnx.ModelProto) -> float:
        return 100 * float((_logits(candidate, judging).argmax(-1) == wanted.argmax(-1)).mean())

    if top1_kept(everything) >= JUDGED_TOP1:
        return everything, []
    # What each layer costs alone; errors of different layers add up, near enough to say which to begin with.
    cost, few = {}, judging[: math.ceil(len(judging) * RANKED_SHARE)]
    ranked = wanted[: sum(map(len, few))]
    for layer in track(layers, "measuring layers in 8 bits"):
        alone = _logits(_leave_out(everything, plain, set(layers) - {layer}), few)
        cost[layer] = float(np.square(alone - ranked).mean())
    worst_first = sorted(layers, key=lambda name: -cost[name])

    def holds(count: int) -> bool:
        return top1_kept(_leave_out(everything, plain, set(worst_first[:count]))) >= JUDGED_TOP1

    # By halving: without a layer more in 8 bits top-1 holds no worse, near enough.
    fewest = 1 + bisect_left(range(1, len(layers)), True, key=holds)
    left_out = worst_first[:fewest]
    logger.info(f"8 bits: {len(left_out)} of {len(layers)} layers stay in {instead}: {', '.join(left_out)}")
    return _leave_out(everything, plain, set(left_out)), left_out


def linear_layers(model: onnx.ModelProto) -> list[str]:
    """The nodes that become INT8: products with a constant matrix, but for the low-pass filter of LFE."""
    constants = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and constants.get(node.input[1]) == 2 and not node.input[1].endswith(LOWPASS)
    ]


class _Batches(CalibrationDataReader):
    def __init__(self, batches: Sequence[NDArray[Any]]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch}


def _with_qdq(plain: onnx.ModelProto, layers: Sequence[str], batches: Sequence[NDArray[Any]]) -> onnx.ModelProto:
    work = onnx.ModelProto()
    work.CopyFrom(plain)  # quantize_static moves the weights of what it is given into files
    with tempfile.TemporaryDirectory() as folder, quiet("root"):
        target = Path(folder) / "int8.onnx"
        quantize_static(
            work,
            str(target),
            _Batches(batches),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(layers),
            per_channel=True,
            activation_type=QuantType.QInt8,  # what TensorRT takes; on CPUs as fast as QUInt8
            weight_type=QuantType.QInt8,
            reduce_range=True,  # weights of 7 bits: without VNNI, x86 adds two products of 8 bits in 16 and saturates
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
            },
        )
        model = onnx.load(target)
    model.producer_name = plain.producer_name
    # The quantiser gives what it rounds to whoever reads it; only the layers shall see it.
    inputs = {node.name: node.input for node in plain.graph.node if node.name not in layers}
    for node in model.graph.node:
        if node.name in inputs:
            node.input[:] = inputs[node.name]
    return model


def _leave_out(quantised: onnx.ModelProto, plain: onnx.ModelProto, layers: set[str]) -> onnx.ModelProto:
    """`quantised` with some layers as they are in `plain`."""
    model = onnx.ModelProto()
    model.CopyFrom(quantised)
    graph = model.graph
    before = {node.name: node for node in plain.graph.node if node.name in layers}
    floats = {tensor.name: tensor for tensor in plain.graph.initializer}
    for node in graph.node:
        if node.name in layers:
            node.input[:] = before[node.name].input
            graph.initializer.append(floats[node.input[1]])
    # What feeds nothing any more goes.
    needed = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.name in needed}
    del graph.initializer[:]
    graph.initializer.extend(constants.values())
    return model


def _logits(model: onnx.ModelProto, batches: Sequence[Images]) -> Images:
    session = OnnxRuntime(model.SerializeToString())
    return np.concatenate([logits_of(session, batch) for batch in batches])
