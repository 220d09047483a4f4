"""Outliers between a norm and the linear layers that read it are moved into the weights, exactly, before 8 bits.

A channel in which a LayerNorm's output is large sets the step of the whole tensor. Divide it in the norm, multiply the
weights that read it: the function stays (SmoothQuant, Xiao et al., 2023). Factors are powers of two, by which no
floating-point format rounds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowpass.export.onnx.rounding import ACTIVATION, best_share, inputs_of

STRENGTHS = (0.0, 0.25, 0.5, 0.75)  # of the exponent; 0: nothing is moved


@dataclass(frozen=True)
class _Norm:
    """A LayerNormalization, and the products with a constant that read it, directly or a slice of its rows."""

    node: onnx.NodeProto
    readers: tuple[onnx.NodeProto, ...]


def fold_outliers(model: onnx.ModelProto, batches: Sequence[NDArray[Any]], largest: float) -> onnx.ModelProto:
    """A copy of `model` that computes the same, its norms' outputs easier to round.

    How much is moved is chosen norm by norm: what leaves the products' outputs nearest once both sides are rounded.

    Args:
        model: in FP32 or FP16, nothing in 8 bits yet.
        batches: of the graph's input, to calibrate on.
        largest: whole number of a rounded weight.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in folded.graph.initializer}
    norms = list(_norms(folded, constants))
    if not norms:
        return folded
    seen = inputs_of(model, [norm.node.output[0] for norm in norms], batches)
    for norm in norms:
        weights = [onnx.numpy_helper.to_array(constants[reader.input[1]]) for reader in norm.readers]
        rows = seen[norm.node.output[0]].rows
        factors = _factors(rows, torch.from_numpy(np.concatenate(weights, 1).astype(np.float32)), largest).numpy()
        if (factors == 1).all():
            continue
        for place in range(1, len(norm.node.input)):
            values = onnx.numpy_helper.to_array(constants[norm.node.input[place]])
            norm.node.input[place] = _added(folded, values / factors.astype(values.dtype), norm.node, place)
        for reader, weight in zip(norm.readers, weights, strict=True):
            reader.input[1] = _added(folded, weight * factors[:, None].astype(weight.dtype), reader, 1)
    used = {name for node in folded.graph.node for name in node.input}
    kept = [tensor for tensor in folded.graph.initializer if tensor.name in used]
    del folded.graph.initializer[:]
    folded.graph.initializer.extend(kept)
    return folded


def _norms(model: onnx.ModelProto, constants: dict[str, onnx.TensorProto]) -> Iterator[_Norm]:
    """Those that nothing else reads: a factor must reach every reader."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for output in model.graph.output:
        readers.setdefault(output.name, []).append(onnx.NodeProto())
    for node in model.graph.node:
        if node.op_type != "LayerNormalization" or not set(node.input[1:]) <= set(constants):
            continue
        found = list[onnx.NodeProto]()
        for reader in readers.get(node.output[0], []):
            found += readers.get(reader.output[0], []) if reader.op_type == "Slice" else [reader]
        if found and all(_is_product(reader, constants) for reader in found):
            yield _Norm(node, tuple(found))


def _is_product(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    return node.op_type == "MatMul" and node.input[1] in constants and len(constants[node.input[1]].dims) == 2


def _factors(rows: Tensor, weight: Tensor, largest: float) -> Tensor:
    """What each channel [C] is divided by: the powers of two that leave rounded products nearest to exact ones.

    Args:
        rows: inputs [N, C].
        weight: of all readers side by side [C, K].
        largest: see `fold_outliers`.
    """
    tiny = torch.finfo(torch.float32).tiny
    tall, wide = rows.abs().amax(0).clamp_min(tiny), weight.abs().amax(1).clamp_min(tiny)
    exact = rows @ weight

    def factors(strength: float) -> Tensor:
        raw = strength * tall.log2() - strength * wide.log2()
        return torch.exp2((raw - raw.mean()).round().clamp(-8, 8))

    def error(strength: float) -> float:
        x, w = rows / factors(strength), weight * factors(strength)[:, None]
        step = x.abs().max() / ACTIVATION
        step = step * best_share(x, w, step)
        steps = w.abs().amax(0) / largest
        rounded = (w / steps.clamp_min(tiny)).round() * steps
        return float(((x / step).round().clamp(-ACTIVATION - 1, ACTIVATION) * step @ rounded - exact).square().sum())

    return factors(min(STRENGTHS, key=error))


def _added(model: onnx.ModelProto, values: NDArray[Any], node: onnx.NodeProto, place: int) -> str:
    """A new constant of the graph, by its name."""
    name = f"{node.name}.{place}.folded"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
    return name
