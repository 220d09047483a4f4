"""Attention as deployed: heads of a size that fuses, or rows as three GEMMs leave them."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowpass.export.graph.cls_score import cls_logits
from lowpass.export.options import OPSET
from lowpass.pipeline.method.token_choices import TokenScore
from lowpass.pipeline.model.slim_attention import AttentionWeights, SlimAttention, attend

FUSED_HEAD_STEP = 4  # TensorRT's fused attention takes FP16/BF16 heads of 12, 16, 20, ... channels, query like value
FUSED_HEAD_LEAST = 12
Products = Literal["three", "one", "one, heads first"]


class FusedAttention(nn.Module):
    """`SlimAttention` with heads of a size that TensorRT fuses.

    With `head_dim`, query/key and value heads are zero-padded to that one size, which is exact: a zero channel adds
    nothing to a logit, and a zero value meets a zero column of the projection. In front of a norm, which would count
    them, zeros are cut off again.

    `products` says how query, key and value are computed. In FP16 as three GEMMs: TensorRT makes one of them itself,
    and its attention reads what that gives where it is, while it moves the parts of one that is split. For CPUs in INT8
    as one that is split. In 8 bits for TensorRT as one whose heads are set apart all at once, which takes one kernel.

    With `gives_logits`, what the `cls` score gets is CLS's row before the softmax.
    """

    def __init__(
        self,
        attention: SlimAttention,
        head_dim: int | None,
        products: Products = "three",
        gives_logits: bool = False,
    ) -> None:
        super().__init__()
        self.products, self.gives_logits = products, gives_logits
        self.num_heads = attention.num_heads
        self.qk_dim, self.v_dim = head_dim or attention.qk_dim, head_dim or attention.v_dim
        self.weights = AttentionWeights(attention.weights.scale)
        parts = [(attention.query, self.qk_dim), (attention.key, self.qk_dim), (attention.value, self.v_dim)]
        if products == "three":
            self.query, self.key, self.value = (stacked(self.num_heads, part) for part in parts)
        else:
            self.qkv = stacked(self.num_heads, *parts)
        source, self.norm = attention.proj, attention.norm
        self.own = attention.v_dim if isinstance(self.norm, nn.LayerNorm) else self.v_dim
        self.proj = nn.Linear(self.num_heads * self.own, source.out_features, device=source.weight.device)
        with torch.no_grad():
            self.proj.weight.copy_(padded(source.weight.T, self.num_heads, self.own).T)
            self.proj.bias.copy_(source.bias)

    def forward(self, x: Tensor, score: TokenScore | None = None, *places: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `SlimAttention.forward`, but for `gives_logits`."""
        query, key, value = self._heads(x, *places)
        mixed, weights = attend(query, key, value, self.weights, score if score == "full" else None)
        if score == "cls":
            weights = cls_logits(query, key, self.weights.scale)
            if not self.gives_logits:
                weights = weights.softmax(-1)
        if self.own < self.v_dim:
            mixed = mixed[..., : self.own]
        return self.proj(self.norm(mixed.transpose(1, 2).flatten(2))), weights

    def _heads(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, ...]:
        """Query, key and value [B, H, T, d]; here no place turns them."""
        if self.products == "one, heads first":
            return by_head(self.qkv(x), 3 * self.num_heads).split(self.num_heads, 1)
        if self.products == "three":
            parts: tuple[Tensor, ...] = (self.query(x), self.key(x), self.value(x))
        else:
            parts = self.qkv(x).split([self.num_heads * d for d in (self.qk_dim, self.qk_dim, self.v_dim)], -1)
        return tuple(by_head(part, self.num_heads) for part in parts)


class RowAttention(nn.Module):
    """`SlimAttention` for CPU runtimes in FP32, without a copy or a sum that can be spared.

    ONNX's `Attention` reads the rows [B, T, H * d] of three GEMMs as they are; what one GEMM gives would have to be
    split, and heads set apart be transposed. Only the query keeps its bias: a key's adds the same to all logits of a
    query, which softmax does not see, and as weights sum to one, a value's reaches the projection as it is and goes
    into its bias.
    """

    def __init__(self, attention: SlimAttention) -> None:
        super().__init__()
        self.num_heads, self.weights = attention.num_heads, attention.weights
        self.query, self.key, self.value = attention.query, unbiased(attention.key), unbiased(attention.value)
        self.proj = taking_bias(attention.proj, attention.value)

    def forward(self, x: Tensor, score: TokenScore | None = None) -> tuple[Tensor, Tensor | None]:
        """As `SlimAttention.forward`, for blocks that do not read the `full` score."""
        parts = self.query(x), self.key(x), self.value(x)
        query, key, value = (by_head(part, self.num_heads) for part in parts)
        if torch.onnx.is_in_onnx_export():
            return self.proj(self._by_row(*parts)), self.weights(query[:, :, :1], key) if score == "cls" else None
        mixed, weights = attend(query, key, value, self.weights, score)
        return self.proj(mixed.transpose(1, 2).flatten(2)), weights

    def _by_row(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = self.num_heads
        attributes: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": heads, "scale": self.weights.scale}
        # Symbolic, with a shape of its own: `torch.onnx.ops.attention` takes value heads to be as long as query's.
        return torch.onnx.ops.symbolic(
            "Attention", (query, key, value), attributes, dtype=value.dtype, shape=value.shape, version=OPSET
        )


def unbiased(layer: nn.Linear) -> nn.Linear:
    """The layer, sharing its weights, without a bias."""
    bare = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    bare.weight = layer.weight
    return bare


def taking_bias(proj: nn.Linear, value: nn.Linear) -> nn.Linear:
    """The projection with what the bias of `value` adds to its output in its own bias."""
    if value.bias is None:
        return proj
    taking = nn.Linear(proj.in_features, proj.out_features, device="meta")
    with torch.no_grad():
        taking.weight, taking.bias = proj.weight, nn.Parameter(proj.bias + proj.weight @ value.bias, False)
    return taking


def stacked(num_heads: int, *parts: tuple[nn.Linear, int]) -> nn.Linear:
    """Layers as one, the heads of each zero-padded to its size; with a bias where any has one."""
    first = parts[0][0]
    rows = num_heads * sum(size for _, size in parts)
    biased = any(layer.bias is not None for layer, _ in parts)
    stacked = nn.Linear(first.in_features, rows, bias=biased, device=first.weight.device)
    with torch.no_grad():
        stacked.weight.copy_(torch.cat([padded(layer.weight, num_heads, size) for layer, size in parts]))
        if biased:
            biases = [
                (layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias) for layer, _ in parts
            ]
            stacked.bias.copy_(
                torch.cat([padded(bias, num_heads, size) for bias, (_, size) in zip(biases, parts, strict=True)])
            )
    return stacked


def padded(rows: Tensor, num_heads: int, size: int) -> Tensor:
    """Rows [H * d, ...] -> [H * size, ...], zeros behind each head's own."""
    heads = rows.unflatten(0, (num_heads, -1))
    padded = heads.new_zeros(num_heads, size, *heads.shape[2:])
    padded[:, : heads.shape[1]] = heads
    return padded.flatten(0, 1)


def by_head(part: Tensor, num_heads: int) -> Tensor:
    """[B, T, H * d] -> [B, H, T, d]."""
    return part.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def fused_head_dim(attention: SlimAttention) -> int:
    """The smallest head size that holds both kinds of head and that TensorRT fuses."""
    needed = max(attention.qk_dim, attention.v_dim, FUSED_HEAD_LEAST)
    return -(-needed // FUSED_HEAD_STEP) * FUSED_HEAD_STEP
