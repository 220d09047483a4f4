"""Parts of a model as small ONNX graphs: at other token counts, and several in a row."""

import numpy as np
import onnx
import torch
from torch import Tensor

PLACES = "places"  # an input of parts, which all links of a chain share
ELEMENT = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
}


def with_tokens(part: onnx.ModelProto, traced: int, wanted: int) -> onnx.ModelProto:
    """A part exported at `traced` tokens as it would be exported at `wanted`: an export takes longer than a timing.

    Token counts stand in the shapes of input and output, and in the second place of what tensors are reshaped to.
    """
    if wanted == traced:
        return part
    graph = onnx.ModelProto()
    graph.CopyFrom(part)
    del graph.graph.value_info[:]
    for value in (*graph.graph.input, *graph.graph.output):
        if value.type.tensor_type.shape.dim[1].dim_value == traced:
            value.type.tensor_type.shape.dim[1].dim_value = wanted
    targets = {node.input[1] for node in graph.graph.node if node.op_type == "Reshape"}
    for tensor in graph.graph.initializer:
        if tensor.name in targets:
            shape = onnx.numpy_helper.to_array(tensor).copy()
            if shape[1] == traced:
                shape[1] = wanted
            tensor.CopyFrom(onnx.numpy_helper.from_array(shape, tensor.name))
    return graph


def places_of(tokens: Tensor, count: int) -> Tensor:
    """Some places below `count` for tokens [B, T, C], which no runtime can know before it runs: [B, T]."""
    return (tokens[..., 0].sigmoid() * count).long()


def with_places(part: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """A part with `places_of` its tokens in place of that input."""
    graph = onnx.ModelProto()
    graph.CopyFrom(part)
    (given,) = (value for value in graph.graph.input if value.name == PLACES)
    graph.graph.input.remove(given)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(graph.graph.input[0].type.tensor_type.elem_type)
    names = [f"{PLACES}.{step}" for step in ("channel", "first", "share", "count", "any")]
    channel, first, share, rows, any_ = names
    for name, values in ((channel, np.array(0, np.int64)), (rows, np.array(count, dtype))):
        graph.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    nodes = [
        onnx.helper.make_node("Gather", ["images", channel], [first], name=first, axis=2),
        onnx.helper.make_node("Sigmoid", [first], [share], name=share),
        onnx.helper.make_node("Mul", [share, rows], [any_], name=any_),
        onnx.helper.make_node("Cast", [any_], [PLACES], name=PLACES, to=onnx.TensorProto.INT64),
        *graph.graph.node,
    ]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    return graph


def repeat_part(part: onnx.ModelProto, links: int, dtype: torch.dtype) -> onnx.ModelProto:
    """`links` copies of a part in a row, each with weights of its own, as in a model; FP32 at either end. `places_of`
    the first one's tokens are those of all."""
    chain = onnx.ModelProto()
    chain.CopyFrom(part)
    graph = chain.graph
    for field in (graph.node, graph.initializer, graph.value_info):
        del field[:]
    narrow = dtype != torch.float32
    first, last = ("images.cast", "logits.cast") if narrow else ("images", "logits")
    if narrow:
        graph.node.append(onnx.helper.make_node("Cast", ["images"], [first], to=ELEMENT[dtype]))
    for link in range(links):
        names = {
            "": "",  # an optional input that is left out
            "images": first if link == 0 else f"between.{link}",
            "logits": last if link == links - 1 else f"between.{link + 1}",
        }
        names |= {name: name for node in part.graph.node for name in (*node.input, *node.output) if _shared(name)}
        for node in part.graph.node:
            if link and _shared(node.output[0]):
                continue
            copied = graph.node.add()
            copied.CopyFrom(node)
            copied.name = f"{link}.{node.name}"
            copied.input[:] = [names.get(name, f"{link}.{name}") for name in node.input]
            copied.output[:] = [names.get(name, f"{link}.{name}") for name in node.output]
        for tensor in part.graph.initializer:
            if _shared(tensor.name):
                if not link:
                    graph.initializer.add().CopyFrom(tensor)
                continue
            weights = graph.initializer.add()
            weights.CopyFrom(tensor)
            weights.name = f"{link}.{tensor.name}"
    if narrow:
        graph.node.append(onnx.helper.make_node("Cast", [last], ["logits"], to=onnx.TensorProto.FLOAT))
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return chain


def _shared(value: str) -> bool:
    return value == PLACES or value.startswith(f"{PLACES}.")
