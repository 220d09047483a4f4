"""Nodes of an ONNX graph written out as others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray

Types = Mapping[str, onnx.TypeProto.Tensor]


@dataclass
class Replacement:
    """What takes the place of `node`: nodes named after it, of which the last gives its output. None: it stays."""

    node: onnx.NodeProto
    types: Types  # of the graph's values, by name
    known: Mapping[str, NDArray[Any]]  # the graph's constants, by name
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of `node`, by name."""
        return {one.name: onnx.helper.get_attribute_value(one) for one in self.node.attribute}

    def dtype(self, value: str) -> int:
        """The ONNX element type of a value."""
        return self.types[value].elem_type

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One more node; the name of its output."""
        output = f"{self.node.name}.{kind}"
        if count := sum(node.op_type == kind for node in self.nodes):
            output += f"_{count}"
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, values: ArrayLike, dtype: int) -> str:
        """A constant of an ONNX element type; its name."""
        array = np.asarray(values).astype(onnx.helper.tensor_dtype_to_np_dtype(dtype))
        self.constants.append(onnx.numpy_helper.from_array(array, f"{self.node.name}.{name}"))
        return self.constants[-1].name


Rule = Callable[[Replacement], None]


def rewritten(model: onnx.ModelProto, rules: Mapping[str, Rule]) -> onnx.ModelProto:
    """A copy in which each kind of node that has a rule is written out by it; constants that nothing reads are gone."""
    done = onnx.ModelProto()
    done.CopyFrom(model)
    graph = done.graph
    if not any(node.op_type in rules for node in graph.node):
        return done
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type for value in [*inferred.value_info, *inferred.input, *inferred.output]}
    for one in graph.initializer:
        types[one.name] = onnx.helper.make_tensor_type_proto(one.data_type, one.dims).tensor_type
    known = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer if len(one.dims) < 2}
    del graph.node[:]
    for node in model.graph.node:
        replacement = Replacement(node, types, known)
        if node.op_type in rules:
            rules[node.op_type](replacement)
        if replacement.nodes:
            replacement.nodes[-1].output[:] = node.output
        graph.node.extend(replacement.nodes or [node])
        graph.initializer.extend(replacement.constants)
    read = {value for node in graph.node for value in node.input}
    constants = [one for one in graph.initializer if one.name in read]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    return done
