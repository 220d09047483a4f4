"""The deployment graph: the same arithmetic with fewer, larger operations."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowpass.export.graph.attention import FusedAttention, Products, RowAttention, fused_head_dim
from lowpass.export.graph.bias_free import drop_biases
from lowpass.export.graph.cls_score import SeenLogits
from lowpass.export.graph.keep_fp32 import WideAttention, keep_in_fp32
from lowpass.export.graph.last_block import LastBlock, LastProducts
from lowpass.export.graph.precision import AtPrecision, WideLinear
from lowpass.export.graph.rotary import RotaryAttention, RowsStream, gather_with_rows
from lowpass.export.graph.selection import lowering
from lowpass.export.options import DTYPES, FOR_TENSORRT, QUANTISED, Precision, Selection
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.slim_attention import DifferentialAttention
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT


def deployable(
    slim: SlimViT, precision: Precision = "fp32", selection: Selection = "gather", kept: Sequence[str] = ()
) -> nn.Module:
    """A copy of `slim` for inference: images [B, C, H, W] FP32 -> logits [B, classes] FP32, computed in `precision`
    (INT8 and FP8: in what they are quantised from).

    At FP16 and BF16 the heads of blocks whose attention can run fused are padded to a size that TensorRT fuses. FP32
    never fuses there, and the `full` token score needs the whole attention matrix, so neither is padded. FP32 reads
    rows (`RowAttention`); INT8 does not: three GEMMs behind one quantised input ran slower in ONNX Runtime. The
    classifier of BF16 is FP32 (`WideLinear`), for classes tie in BF16. That of FP16 is not: TensorRT-RTX has no FP32
    GEMM for Turing (T4). The layers `kept` are FP32, too (see `keep_fp32.py`).

    Of the last block with attention, and of those above it, no more is computed than the classifier reads; MACs are
    those of the table, in which they count whole.
    """
    model = copy.deepcopy(slim).eval().requires_grad_(False)
    dense = slim.architecture.dense
    whole = model.blocks
    if dense.rotary is not None:
        if selection != "gather":
            raise InputError(f"--selection {selection} is not there for rotary positions, whose places go by an index")
        model.stream = placed = RowsStream()
        for block in whole:
            block.stream = placed
    if DTYPES[precision] != torch.float32 and not dense.differential:
        for block in whole:
            if block.has_attention:
                drop_biases(block)
    keep_in_fp32(whole, kept, DTYPES[precision])
    last = whole[slim.architecture.last_attention]
    written_out = dense.differential or (last.has_attention and isinstance(last.attn, WideAttention))
    if not (dense.reads_image_tokens or written_out or dense.attn_norm):
        rows = 2 if dense.distilled else 1
        model.vit.blocks[whole.index(last)] = LastBlock(last, rows, _last_products(precision))
        whole.remove(last)
    if model.vit.attn_pool is not None:
        model.vit.attn_pool.fused_attn = False  # one row of attention: TensorRT has no fused kernel for it
    # The low-pass of LFE runs along the tokens; where no later block has one, their order does not matter.
    last_lowpass = max((i for i, block in enumerate(whole) if len(block.lowpass)), default=-1)
    for index, block in enumerate(whole):
        if block.has_attention:
            block.attn = _attention(block, precision)  # type: ignore[assignment]
            if isinstance(block.attn, FusedAttention) and block.attn.gives_logits:
                block.seen_tokens = SeenLogits
        if len(block.lowpass):
            block.lowpass = F.pad(block.lowpass, (0, 0, dense.num_prefix_tokens, 0))
        ordered = index < last_lowpass
        block.keep_tokens = lowering(selection, ordered) if dense.rotary is None else _with_rows(ordered)
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return model
    if dtype == torch.bfloat16:
        for name in ("head", "head_dist") if dense.distilled else ("head",):
            setattr(model.vit, name, WideLinear(getattr(model.vit, name)))
    return AtPrecision(model, dtype)


def _with_rows(ordered: bool) -> Callable[[Any, Tensor, int], Any]:
    return partial(gather_with_rows, ordered=ordered)


def _last_products(precision: Precision) -> LastProducts:
    if precision not in FOR_TENSORRT:
        return "query apart"
    return "one, heads first" if precision in QUANTISED else "one"


def _attention(block: SlimBlock, precision: Precision) -> nn.Module:
    if isinstance(block.attn, DifferentialAttention | WideAttention):
        return block.attn  # it reads its matrices anyway
    whole_matrix = block.reads_attention == "full"
    by_row = not (whole_matrix or block.attn.rotary or isinstance(block.attn.norm, nn.LayerNorm))
    if precision == "fp32" and by_row:
        return RowAttention(block.attn)
    padded = DTYPES[precision] != torch.float32 and not whole_matrix
    head_dim = fused_head_dim(block.attn) if padded else None
    products: Products = "three"
    if padded and (precision in QUANTISED or block.attn.rotary):
        products = "one, heads first"  # what turns or narrows heads moves them: all three in one kernel
    elif precision in QUANTISED:
        products = "one"
    gives_logits = precision in FOR_TENSORRT and block.reads_attention == "cls"
    kind = RotaryAttention if block.attn.rotary else FusedAttention
    return kind(block.attn, head_dim, products, gives_logits)
