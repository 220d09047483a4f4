"""FP16 as a GPU computes it: ONNX Runtime's CPU provider computes FP16 files in FP32 and rounds nothing in between, so
that it overflows nowhere. Here tensors are rounded one by one, and their magnitudes are read before they are."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from lowpass.export.runtimes.onnx_runtime import OnnxRuntime, widened
from lowpass.export.runtimes.session import Images, as_input
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.progress import track

HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
LARGEST_HALF = 65504.0
# Operators that compute nothing: what leaves them is no larger than what enters.
SHAPING = ("Concat", "Expand", "Flatten", "Identity", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze")
MOVES = frozenset((*SHAPING, "Gather", "GatherElements", "Slice"))


@dataclass(frozen=True)
class HalfTensor:
    """An FP16 tensor that a node computes."""

    node: str
    name: str
    by_image: bool  # its first axis is the batch, or a multiple of it
    factor: float = 1.0  # what the node multiplies it by inside


@dataclass(frozen=True)
class Magnitude:
    """The largest magnitude of an FP16 tensor, had it been FP32, and the image that has it; None: all have."""

    node: str
    tensor: str
    value: float
    image: int | None


def typed(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """What the graph says of its tensors, and what follows from it, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value for value in [*graph.input, *graph.value_info, *graph.output]}


def half_tensors(model: onnx.ModelProto) -> list[HalfTensor]:
    """The FP16 tensors that nodes compute, in the order of the graph: no weights, and nothing that is only moved.

    Fused attention keeps its logits in FP32, but multiplies the query by the scale in FP16.

    Raises:
        RunError: a tensor's type is unknown.
    """
    known, found = typed(model), list[HalfTensor]()

    def add(node: onnx.NodeProto, name: str, factor: float = 1.0) -> None:
        if name not in known:
            raise RunError(f"the type of {name}, which {node.name} computes, is unknown")
        of = known[name].type.tensor_type
        if of.elem_type == HALF:
            by_image = bool(of.shape.dim) and not of.shape.dim[0].HasField("dim_value")
            found.append(HalfTensor(node.name, name, by_image, factor))

    for node in model.graph.node:
        if node.op_type == "Attention":
            scale = next((attribute.f for attribute in node.attribute if attribute.name == "scale"), 0.0)
            if scale > 1:  # usually it is the root of a head's size, less than 1
                add(node, node.input[0], scale)
        if node.op_type not in MOVES:
            for name in filter(None, node.output):
                add(node, name)
    return found


def infinite_weights(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """FP16 weights that are not finite, each with the node that reads it first."""
    lost = [
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == HALF and not np.isfinite(onnx.numpy_helper.to_array(tensor)).all()
    ]
    return [(name, next((n.name for n in model.graph.node if name in n.input), name)) for name in lost]


def rounded(content: bytes) -> bytes:
    """An FP16 file in FP32, with each tensor that a node computes rounded to FP16 and back: past 65,504 it is infinite,
    as on a GPU. Inside a node (sums of a product, the softmax of attention, the moments of a norm) FP32 stays."""
    source = onnx.load_model_from_string(content)
    names = {tensor.name for tensor in half_tensors(source) if tensor.factor == 1}
    model = onnx.load_model_from_string(widened(content))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        rounding = list[onnx.NodeProto]()
        for index, name in enumerate(node.output):
            if name in names:
                node.output[index] = f"{name}.exact"
                rounding.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=HALF))
                rounding.append(helper.make_node("Cast", [f"{name}.half"], [name], to=FLOAT))
        model.graph.node.extend([node, *rounding])
    return model.SerializeToString()


def magnitudes(content: bytes, batches: Iterable[Images], description: str) -> list[Magnitude]:
    """The largest magnitude of each FP16 tensor of a file on normalised images [B, C, H, W], in the order of the graph.
    Computed in FP32 from FP16's weights: nothing overflows, and so all that would are found at once."""
    tensors = half_tensors(onnx.load_model_from_string(content))
    runtime = OnnxRuntime(_with_magnitudes(content, tensors))
    largest, where, seen = np.zeros(len(tensors)), np.zeros(len(tensors), np.int64), 0
    for batch in track(batches, description):
        feed = {"images": as_input(batch, runtime.metadata)}
        for index, values in enumerate(runtime.session.run([_peak(tensor) for tensor in tensors], feed)):
            at = int(values.argmax())  # NaN is the largest there is
            value = float(values[at]) * tensors[index].factor
            if not value <= largest[index]:
                largest[index], where[index] = value, seen + at
        seen += len(batch)
    return [
        Magnitude(tensor.node, tensor.name, float(value), int(image) if tensor.by_image else None)
        for tensor, value, image in zip(tensors, largest, where, strict=True)
    ]


def _peak(tensor: HalfTensor) -> str:
    return f"{tensor.name}.peak"


def _with_magnitudes(content: bytes, tensors: list[HalfTensor]) -> bytes:
    """The file in FP32 with an output more for each tensor: its largest magnitude [B], or [1] where it is the same for
    all images."""
    model = onnx.load_model_from_string(widened(content))
    graph, axes_as_input = model.graph, model.opset_import[0].version >= 18
    for name, value in (("peak.start", 0), ("peak.end", 1), ("peak.rest", -1)):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    graph.node.append(helper.make_node("Shape", ["images"], ["peak.images"]))
    graph.node.append(helper.make_node("Slice", ["peak.images", "peak.start", "peak.end"], ["peak.batch"]))
    graph.node.append(helper.make_node("Concat", ["peak.batch", "peak.rest"], ["peak.rows"], axis=0))
    graph.node.append(helper.make_node("Concat", ["peak.end", "peak.rest"], ["peak.row"], axis=0))
    for name, by_image in {tensor.name: tensor.by_image for tensor in tensors}.items():
        rows = "peak.rows" if by_image else "peak.row"
        graph.node.append(helper.make_node("Abs", [name], [f"{name}.abs"]))
        graph.node.append(helper.make_node("Reshape", [f"{name}.abs", rows], [f"{name}.rows"]))
        if axes_as_input:
            peak = helper.make_node("ReduceMax", [f"{name}.rows", "peak.end"], [f"{name}.peak"], keepdims=0)
        else:
            peak = helper.make_node("ReduceMax", [f"{name}.rows"], [f"{name}.peak"], axes=[1], keepdims=0)
        graph.node.append(peak)
        graph.output.append(helper.make_tensor_value_info(f"{name}.peak", FLOAT, [None]))
    return model.SerializeToString()
