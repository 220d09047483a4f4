"""INT8 fitted to real inputs, at no cost when the file runs: weights rounded so that their errors cancel, and ranges of
activations that clip what few values reach where that leaves the rest more exact.

Rounded one by one, the 7 bits that every CPU computes alike cost more accuracy than the activations' 8. GPTQ (Frantar,
Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR
2023, algorithm 1) rounds one input channel after the other, and moves what that gets wrong into the weights that are
not yet rounded, as far as the inputs' correlations allow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowpass.export.runtimes.onnx_runtime import OnnxRuntime

LARGEST = 64  # of a weight of 7 bits; see `lowpass.export.onnx.quantize`
ACTIVATION = 127
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of the range of what was seen
ROWS = 1024  # tokens to choose among them by
DAMPING = 0.01  # of the mean diagonal, as in the paper: correlations of few images are not to be trusted fully
BLOCK = 128  # input channels between two updates of all that follow


@dataclass(frozen=True)
class Inputs:
    """What a layer reads: x.T @ x over all rows [C, C], and some of the rows [N, C]."""

    products: Tensor
    rows: Tensor


def fit_to_inputs(
    quantised: onnx.ModelProto, plain: onnx.ModelProto, layers: Sequence[str], batches: Sequence[NDArray[Any]]
) -> None:
    """Set the ranges of what `layers` read and round their INT8 weights anew, in place; scales of weights stay.

    Args:
        quantised: what `quantize_static` made of `plain`, with the largest values seen as ranges.
        plain: the graph in FP32.
        layers: names of `MatMul` nodes of both.
        batches: of the graph's input, to calibrate on.
    """
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    floats = {tensor.name: tensor for tensor in plain.graph.initializer}
    made_by = {output: node for node in quantised.graph.node for output in node.output}
    nodes = {node.name: node for node in quantised.graph.node if node.name in layers}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in plain.graph.node:
        if node.name in layers:
            readers.setdefault(node.input[0], []).append(node)
    for read, inputs in inputs_of(plain, list(readers), batches).items():
        weights = [_tensor(floats[node.input[1]]) for node in readers[read]]
        scale = constants[made_by[nodes[readers[read][0].name].input[0]].input[1]]
        _set(scale, _tensor(scale) * best_share(inputs.rows, torch.cat(weights, 1), _tensor(scale)))
        for node, weight in zip(readers[read], weights, strict=True):
            values, scales = (constants[name] for name in made_by[nodes[node.name].input[1]].input[:2])
            _set(values, compensated(weight, _tensor(scales), inputs.products))


def best_share(rows: Tensor, weight: Tensor, scale: Tensor) -> float:
    """How much of the range is best kept: the one of `SHARES` at which outputs [N, K] err least.

    Args:
        rows: inputs [N, C].
        weight: [C, K].
        scale: of the inputs, at which nothing is clipped.
    """

    def error(share: float) -> float:
        step = scale * share
        seen = (rows / step).round().clamp(-ACTIVATION - 1, ACTIVATION) * step
        return float(((seen - rows) @ weight).square().sum())

    return min(SHARES, key=error)


def compensated(weight: Tensor, scale: Tensor, products: Tensor, largest: int = LARGEST) -> Tensor:
    """Whole numbers that stand for `weight` on inputs of these correlations.

    Args:
        weight: [inputs, outputs].
        scale: of each output [outputs]; what is returned times it is near `weight`.
        products: of inputs with each other, summed over rows [inputs, inputs]: x.T @ x.
        largest: whole number.

    Returns:
        [inputs, outputs], from -`largest` to `largest`.
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
            rounded[row] = (left[row] / scale).round().clamp(-largest, largest)
            errors[row - start] = (left[row] - rounded[row] * scale) / factor[row, row]
            left[row : block.stop] -= factor[row, row : block.stop, None] * errors[row - start]
        left[block.stop :] -= factor[block, block.stop :].T @ errors
    return torch.empty_like(rounded).index_copy_(0, order, rounded)


def inputs_of(model: onnx.ModelProto, names: Sequence[str], batches: Sequence[NDArray[Any]]) -> dict[str, Inputs]:
    """Tensors [..., C] inside the graph on all batches."""
    open_model = onnx.ModelProto()
    open_model.CopyFrom(model)
    open_model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = OnnxRuntime(open_model.SerializeToString()).session
    draw, share = torch.Generator().manual_seed(0), -(-ROWS // len(batches))
    products: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in batches:
        for name, value in zip(names, session.run(names, {"images": batch}), strict=True):
            every = torch.from_numpy(value).float().flatten(0, -2)
            products[name] = products.get(name, torch.zeros(())) + every.T @ every
            rows[name].append(every[torch.randperm(len(every), generator=draw)[:share]])
    return {name: Inputs(products[name], torch.cat(rows[name])) for name in names}


def _tensor(constant: onnx.TensorProto) -> Tensor:
    return torch.from_numpy(onnx.numpy_helper.to_array(constant).copy())


def _set(constant: onnx.TensorProto, values: Tensor) -> None:
    """Other values in the type that is there."""
    there = onnx.numpy_helper.to_array(constant)
    constant.CopyFrom(onnx.numpy_helper.from_array(values.numpy().astype(there.dtype), constant.name))
