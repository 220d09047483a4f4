"""Rounding INT8 weights so that their errors cancel on real inputs, at no cost when the file runs.

Rounded one by one, the 7 bits that every CPU computes alike cost more accuracy than the activations' 8. GPTQ (Frantar,
Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR
2023, algorithm 1) rounds one input channel after the other, and moves what that gets wrong into the weights that are
not yet rounded, as far as the inputs' correlations allow.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.sessions import OnnxRuntime

LARGEST = 64  # of a weight of 7 bits; see `export.quantize`
DAMPING = 0.01  # of the mean diagonal, as in the paper: correlations of few images are not to be trusted fully
BLOCK = 128  # input channels between two updates of all that follow


def round_weights(
    quantised: onnx.ModelProto, plain: onnx.ModelProto, layers: Sequence[str], batches: Sequence[NDArray[Any]]
) -> None:
    """Round the INT8 weights of `layers` anew, in place; scales stay.

    Args:
        quantised: what `quantize_static` made of `plain`.
        plain: the graph in FP32.
        layers: names of `MatMul` nodes of both.
        batches: of the graph's input, to calibrate on.
    """
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    floats = {tensor.name: tensor for tensor in plain.graph.initializer}
    made_by = {output: node for node in quantised.graph.node for output in node.output}
    before = {node.name: node for node in plain.graph.node}
    products = _input_products(plain, [before[layer].input[0] for layer in layers], batches)
    for node in quantised.graph.node:
        if node.name not in layers:
            continue
        read, weights = before[node.name].input
        values, scales = (constants[name] for name in made_by[node.input[1]].input[:2])
        rounded = compensated(_tensor(floats[weights]), _tensor(scales), products[read])
        values.CopyFrom(onnx.numpy_helper.from_array(rounded.numpy().astype(np.int8), values.name))


def compensated(weight: Tensor, scale: Tensor, products: Tensor) -> Tensor:
    """Whole numbers that stand for `weight` on inputs of these correlations.

    Args:
        weight: [inputs, outputs].
        scale: of each output [outputs]; what is returned times it is near `weight`.
        products: of inputs with each other, summed over rows [inputs, inputs]: x.T @ x.

    Returns:
        [inputs, outputs], from -64 to 64.
    """
    order = products.diagonal().argsort(descending=True)  # the largest first: most is left to make up for them
    left, products, scale = weight[order].double(), products[order][:, order].double(), scale.double()
    products.diagonal().add_(DAMPING * (products.diagonal().mean() or 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(products))
    factor = torch.linalg.cholesky(inverse, upper=True)
    rounded = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        block = slice(start, min(start + BLOCK, len(left)))
        errors = torch.empty_like(left[block])
        for row in range(block.start, block.stop):
            rounded[row] = (left[row] / scale).round().clamp(-LARGEST, LARGEST)
            errors[row - start] = (left[row] - rounded[row] * scale) / factor[row, row]
            left[row : block.stop] -= factor[row, row : block.stop, None] * errors[row - start]
        left[block.stop :] -= factor[block, block.stop :].T @ errors
    return torch.empty_like(rounded).index_copy_(0, order, rounded)


def _input_products(
    model: onnx.ModelProto, names: Sequence[str], batches: Sequence[NDArray[Any]]
) -> Mapping[str, Tensor]:
    """x.T @ x of tensors [..., C] inside the graph, summed over all rows of all batches."""
    open_model = onnx.ModelProto()
    open_model.CopyFrom(model)
    outputs = sorted(set(names))
    open_model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    session = OnnxRuntime(open_model.SerializeToString()).session
    products: dict[str, Tensor] = {}
    for batch in batches:
        for name, value in zip(outputs, session.run(outputs, {"images": batch}), strict=True):
            rows = torch.from_numpy(value).flatten(0, -2)
            products[name] = products.get(name, torch.zeros(())) + rows.T @ rows
    return products


def _tensor(constant: onnx.TensorProto) -> Tensor:
    return torch.from_numpy(onnx.numpy_helper.to_array(constant).copy())
