"""Multi-head attention of a slim block: softmax attention with heads of any size, with or without rotary positions, and
differential attention."""

import math

import torch
from timm.layers import RmsNorm
from torch import Tensor, nn
from torch.nn import functional as F

from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.rotary import rotate
from lowpass.pipeline.method.token_choices import TokenScore


class AttentionWeights(nn.Module):
    """Softmax attention [B, H, T, T] from query and key [B, H, T, qk_dim]. A module of its own, so that the
    dependency graph can be told that query channels pair with key channels and with nothing else."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return ((query * self.scale) @ key.transpose(-2, -1)).softmax(-1)


class SlimAttention(nn.Module):
    """Multi-head attention whose query/key and value heads may differ in size. `norm` comes before the projection, in
    models that have one there (BEiT-3). `table` are the cosines and sines of rotary positions (see `rotary_table`);
    `pairs` [H, qk_dim / 2] says of each head which pairs of the dense model's it has."""

    table: Tensor
    pairs: Tensor

    def __init__(
        self,
        dim: int,
        shape: BlockShape,
        scale: float,
        bias: bool,
        norm: nn.Module | None = None,
        table: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = shape.heads
        self.query = nn.Linear(dim, shape.heads * shape.qk_dim, bias=bias)
        self.key = nn.Linear(dim, shape.heads * shape.qk_dim, bias=bias)
        self.value = nn.Linear(dim, shape.heads * shape.v_dim, bias=bias)
        self.weights = AttentionWeights(scale)
        self.norm = norm or nn.Identity()
        self.proj = nn.Linear(shape.heads * shape.v_dim, dim)
        self.rotary = table is not None
        if table is not None:
            self.register_buffer("table", table, persistent=False)
            self.register_buffer("pairs", torch.arange(shape.qk_dim // 2).repeat(shape.heads, 1))

    @property
    def qk_dim(self) -> int:
        """Channels of a query or key head."""
        return self.query.out_features // self.num_heads

    @property
    def v_dim(self) -> int:
        """Channels of a value head."""
        return self.value.out_features // self.num_heads

    def features(
        self, x: Tensor, score: TokenScore | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] -> what the projection reads [B, T, H * v_dim], and the attention that a token score needs:
        [B, H, T, T] for `full`, the CLS row [B, H, 1, T] for `cls`. Only `full` keeps attention from running fused.

        `places` [B, T] are the tokens' rows of the table of rotary positions; None: all of them, in order.
        """
        query, key = self.query_key(x, places)
        return self._mixed(query, key, self._heads(self.value(x)), score)

    def query_key(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, T, qk_dim] as their products become logits: turned where positions are rotary."""
        query, key = self._heads(self.query(x)), self._heads(self.key(x))
        if not self.rotary:
            return query, key
        rows = self.table[:, None] if places is None else self.table[:, places]  # [2, B or 1, T, D / 2]
        cosine, sine = rows[..., self.pairs].transpose(2, 3)
        return rotate(query, cosine, sine).to(query.dtype), rotate(key, cosine, sine).to(key.dtype)

    def forward(
        self, x: Tensor, score: TokenScore | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] -> [B, T, C], and the attention that a token score needs. See `features`."""
        features, weights = self.features(x, score, places)
        return self.proj(features), weights

    def traceable(self, x: Tensor) -> Tensor:
        """`forward` with the attention matrix written out, as the dependency graph has to see it. Turning, which works
        inside a head, is left out."""
        query, key, value = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        return self.proj(self._mixed(query, key, value, "full")[0])

    def _heads(self, rows: Tensor) -> Tensor:
        """[B, T, H * d] -> [B, H, T, d]."""
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mixed(
        self, query: Tensor, key: Tensor, value: Tensor, score: TokenScore | None
    ) -> tuple[Tensor, Tensor | None]:
        mixed, weights = attend(query, key, value, self.weights, score)
        return self.norm(mixed.transpose(1, 2).flatten(2)), weights


class DifferentialAttention(SlimAttention):
    """The difference of two softmaxes, each of one half of a head's query and key channels (Ye et al., 2024), as timm's
    `DiffAttention` computes it. A norm inside each head ties its channels together: heads go whole."""

    def __init__(self, dim: int, shape: BlockShape, scale: float, bias: bool, index: int) -> None:
        super().__init__(dim, shape, scale, bias)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.zeros(shape.qk_dim // 2)) for _ in range(4)
        )
        self.sub_norm = RmsNorm(shape.v_dim, eps=1e-5)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * index)

    def features(
        self, x: Tensor, score: TokenScore | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `SlimAttention.features`; attention is always written out, and positions are not rotary."""
        value, one, two = self._parts(x)
        terms = ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
        first, second = ((query * key).sum().float().exp() for query, key in terms)
        weights = one - (first - second + self.lambda_init).type_as(two) * two
        mixed = self.sub_norm(weights @ value) * (1 - self.lambda_init)
        seen = {"full": weights, "cls": weights[:, :, :1]}
        return mixed.transpose(1, 2).flatten(2), None if score is None else seen[score]

    def traceable(self, x: Tensor) -> Tensor:
        """See `SlimAttention.traceable`. What works inside a head, or on all heads alike, is left out."""
        value, one, two = self._parts(x)
        return self.proj(((one - two) @ value).transpose(1, 2).flatten(2))

    def inside_heads(self) -> list[nn.Parameter]:
        """What all heads share: their norm, and what weighs the second softmax."""
        return [self.sub_norm.weight, self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2]

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value heads, and both softmaxes [B, H, T, T]."""
        query, key = (
            layer(x).unflatten(-1, (self.num_heads, 2, -1)).permute(0, 2, 3, 1, 4) for layer in (self.query, self.key)
        )
        value = self.value(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return value, *(self.weights(query[:, :, half], key[:, :, half]) for half in (0, 1))


def attend(
    query: Tensor, key: Tensor, value: Tensor, weights: AttentionWeights, score: TokenScore | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of [B, H, T, D] tensors, and as much of its matrix as the score needs."""
    if score == "full":
        matrix = weights(query, key)
        return matrix @ value, matrix
    mixed = F.scaled_dot_product_attention(query, key, value, scale=weights.scale)
    return mixed, weights(query[:, :, :1], key) if score == "cls" else None
