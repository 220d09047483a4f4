"""A graph of opset 23 as one of an older opset, for runtimes that do not read the newest."""

import math

import onnx

from lowpass.export.onnx.attention_nodes import products_and_softmax
from lowpass.export.onnx.rewrite import Replacement, Rule, rewritten
from lowpass.export.options import OPSET, Opset
from lowpass.pipeline.base.errors import InputError

FLOAT, BFLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16


def at_opset(model: onnx.ModelProto, opset: Opset) -> onnx.ModelProto:
    """A copy in an older opset, that computes the same: what came later is written out, and the result held against
    ONNX's own schemas, types included.

    Raises:
        InputError: the opset has no words for something, such as FP16 scales of `QuantizeLinear` below 19.
        RunError: an `Attention` holds what is not written out.
    """
    if opset == OPSET:
        return model
    older = model
    for since, rules in CAME:
        if opset < since:
            older = rewritten(older, rules)
    older.opset_import[0].version = opset
    older.ir_version = min(model.ir_version, onnx.helper.find_min_ir_version_for(older.opset_import))
    try:
        onnx.checker.check_model(older, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"opset {opset} cannot say what this graph does; give a later --opset ({reason})") from None
    return older


def _rms_norm(of: Replacement) -> None:
    x, weight = of.node.input
    dtype, told = of.dtype(x), of.attributes
    wide = x if dtype == FLOAT else of.add("Cast", x, to=FLOAT)
    axes = of.constant("axes", [told.get("axis", -1)], onnx.TensorProto.INT64)
    mean = of.add("ReduceMean", of.add("Mul", wide, wide), axes, keepdims=1)
    size = of.add("Sqrt", of.add("Add", mean, of.constant("epsilon", told.get("epsilon", 1e-5), FLOAT)))
    normed = of.add("Div", wide, size)
    of.add("Mul", normed if dtype == FLOAT else of.add("Cast", normed, to=dtype), weight)


def _conv(of: Replacement) -> None:
    """BF16 in FP32: what it multiplies is BF16 as before, what it adds up is wide."""
    dtype = of.dtype(of.node.input[0])
    if dtype == BFLOAT16:
        wide = [of.add("Cast", value, to=FLOAT) for value in of.node.input]
        of.add("Cast", of.add("Conv", *wide, **of.attributes), to=dtype)


def _gelu(of: Replacement) -> None:
    (x,), dtype = of.node.input, of.dtype(of.node.input[0])
    one, half = of.constant("one", 1, dtype), of.constant("half", 0.5, dtype)
    if of.attributes.get("approximate", b"none") == b"tanh":
        cubed = of.add("Mul", of.add("Mul", x, x), x)
        bent = of.add("Add", x, of.add("Mul", cubed, of.constant("bend", 0.044715, dtype)))
        share = of.add("Tanh", of.add("Mul", bent, of.constant("slope", math.sqrt(2 / math.pi), dtype)))
    else:
        share = of.add("Erf", of.add("Div", x, of.constant("sqrt2", math.sqrt(2), dtype)))
    # In this order: it is the pattern that ONNX Runtime makes one kernel of.
    of.add("Mul", of.add("Mul", x, of.add("Add", share, one)), half)


def _reduce(of: Replacement) -> None:
    """Axes as an attribute."""
    value, axes = of.node.input
    of.add(of.node.op_type, value, axes=of.known[axes].tolist(), keepdims=of.attributes.get("keepdims", 1))


def _split(of: Replacement) -> None:
    """Into equal parts, one an output."""
    if "num_outputs" in of.attributes:
        of.add("Split", of.node.input[0], axis=of.attributes.get("axis", 0))


# What came with an opset, latest first, and what said the same before.
CAME: tuple[tuple[int, dict[str, Rule]], ...] = (
    (23, {"Attention": products_and_softmax, "RMSNormalization": _rms_norm}),
    (22, {"Conv": _conv}),  # in BF16
    (20, {"Gelu": _gelu}),
    (18, {"ReduceMean": _reduce, "ReduceL2": _reduce, "Split": _split}),
)
