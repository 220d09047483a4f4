"""`Attention`, which ONNX has since opset 23, as the products and the softmax it stands for."""

import onnx

from lowpass.export.onnx.rewrite import Replacement, rewritten
from lowpass.pipeline.base.errors import RunError

# What our graphs tell `Attention`, and what they leave at its default.
TOLD = {"scale", "q_num_heads", "kv_num_heads"}
DEFAULTS = {"is_causal": 0, "qk_matmul_output_mode": 0, "softcap": 0.0}


def without_attention_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with each `Attention`, of heads [B, H, T, d] or of rows [B, T, H * d], written out.

    For opsets below 23, and around INT8 layers in FP32: TensorRT fuses `Attention` at FP16 and BF16 alone.

    Raises:
        RunError: one has a mask of booleans, a cache, or something else that is not written out here.
    """
    return rewritten(model, {"Attention": products_and_softmax})


def products_and_softmax(of: Replacement) -> None:
    """The form that TensorRT fuses at FP16 and BF16: the query is scaled before the product, where it is smallest, too,
    and the softmax runs along the last axis."""
    query, key, value, *mask = _inputs(of)
    dtype, heads = of.dtype(query), of.attributes.get("q_num_heads", 0)
    head_dim = of.types[query].shape.dim[-1].dim_value // (heads or 1)
    scale = of.constant("scale", of.attributes.get("scale", head_dim**-0.5), dtype)
    scaled = of.add("Mul", query, scale)
    if heads:
        rows = of.constant("heads", [0, 0, heads, -1], onnx.TensorProto.INT64)
        scaled, key, value = (
            of.add("Transpose", of.add("Reshape", part, rows), perm=perm)
            for part, perm in ((scaled, (0, 2, 1, 3)), (key, (0, 2, 3, 1)), (value, (0, 2, 1, 3)))
        )
    else:
        key = of.add("Transpose", key, perm=(0, 1, 3, 2))
    logits = of.add("MatMul", scaled, key)
    if mask:
        logits = of.add("Add", logits, mask[0])
    mixed = of.add("MatMul", of.add("Softmax", logits, axis=-1), value)
    if heads:
        together = of.constant("together", [0, 0, -1], onnx.TensorProto.INT64)
        of.add("Reshape", of.add("Transpose", mixed, perm=(0, 2, 1, 3)), together)


def _inputs(of: Replacement) -> list[str]:
    """Query, key, value, and the mask if there is one: it is added to the logits.

    Raises:
        RunError: there is more to it.
    """
    node, told = of.node, of.attributes
    other = {name for name, value in told.items() if name not in TOLD and DEFAULTS.get(name) != value}
    if told.get("q_num_heads") != told.get("kv_num_heads"):
        other.add("kv_num_heads")
    if len(node.input) > 4 or len(node.output) > 1:
        other.add("a cache")
    elif len(node.input) == 4 and of.dtype(node.input[3]) == onnx.TensorProto.BOOL:
        other.add("a mask of booleans")
    if other:
        raise RunError(
            f"{node.name}: an Attention with {', '.join(sorted(other))} cannot be written out; export with opset 23"
        )
    return list(node.input)
