"""The deployment graph: the same arithmetic with fewer, larger operations."""

import copy

import torch
from torch import nn

from lowpass.export.graph.attention import FusedAttention, RowAttention, fused_head_dim
from lowpass.export.graph.last_block import LastBlock
from lowpass.export.graph.precision import AtPrecision, WideLinear
from lowpass.export.graph.selection import LOWERINGS
from lowpass.export.options import DTYPES, Precision, Selection
from lowpass.pipeline.model.slim_vit import SlimViT


def deployable(slim: SlimViT, precision: Precision = "fp32", selection: Selection = "gather") -> nn.Module:
    """A copy of `slim` for inference: images [B, C, H, W] FP32 -> logits [B, classes] FP32, computed in `precision`
    (INT8: in FP32, to be quantised).

    At FP16 and BF16 the heads of blocks whose attention can run fused are padded to a size that TensorRT fuses. FP32
    never fuses there, and the `full` token score needs the whole attention matrix, so neither is padded. FP32 reads
    rows (`RowAttention`); INT8 does not: three GEMMs behind one quantised input ran slower in ONNX Runtime. The
    classifier is FP32 (`WideLinear`).

    MACs are those of the table, in which the last block counts whole.
    """
    model = copy.deepcopy(slim).eval().requires_grad_(False)
    *inner, last = model.blocks
    for block in inner:
        whole_matrix = block.reads_attention == "full"
        if precision == "fp32" and not whole_matrix:
            attention: nn.Module = RowAttention(block.attn)
        else:
            padded = precision in ("fp16", "bf16") and not whole_matrix
            attention = FusedAttention(block.attn, fused_head_dim(block.attn) if padded else None)
        block.attn = attention  # type: ignore[assignment]
        block.keep_tokens = LOWERINGS[selection]
    model.vit.blocks[-1] = LastBlock(last, rows=2 if slim.architecture.dense.distilled else 1)
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return model
    for name in ("head", "head_dist") if slim.architecture.dense.distilled else ("head",):
        setattr(model.vit, name, WideLinear(getattr(model.vit, name)))
    return AtPrecision(model, dtype)
