"""One block of the slim ViT: its heads, widths and token count are its own."""

from collections.abc import Callable
from typing import cast

import torch
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.energy import EnergyNorm
from lowpass.pipeline.method.frequency import token_lowpass_matrix
from lowpass.pipeline.method.token_scores import TOKEN_CRITERIA, SeenTokens, TokenScore, keep_tokens
from lowpass.pipeline.model.architecture import Architecture


class AttentionWeights(nn.Module):
    """Softmax attention [B, H, T, T] from query and key [B, H, T, qk_dim]. A module of its own, so that the
    dependency graph can be told that query channels pair with key channels and with nothing else."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return ((query * self.scale) @ key.transpose(-2, -1)).softmax(-1)


class SlimAttention(nn.Module):
    """Multi-head attention whose query/key and value heads may differ in size."""

    def __init__(self, dim: int, shape: BlockShape, scale: float, bias: bool) -> None:
        super().__init__()
        self.num_heads = shape.heads
        self.query = nn.Linear(dim, shape.heads * shape.qk_dim, bias=bias)
        self.key = nn.Linear(dim, shape.heads * shape.qk_dim, bias=bias)
        self.value = nn.Linear(dim, shape.heads * shape.v_dim, bias=bias)
        self.weights = AttentionWeights(scale)
        self.proj = nn.Linear(shape.heads * shape.v_dim, dim)

    @property
    def qk_dim(self) -> int:
        """Channels of a query or key head."""
        return self.query.out_features // self.num_heads

    @property
    def v_dim(self) -> int:
        """Channels of a value head."""
        return self.value.out_features // self.num_heads

    def features(self, x: Tensor, score: TokenScore | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] -> what the projection reads [B, T, H * v_dim], and the attention that a token score needs:
        [B, H, T, T] for `full`, the CLS row [B, H, 1, T] for `cls`. Only `full` keeps attention from running fused."""
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed, weights = attend(query, key, value, self.weights, score)
        return mixed.transpose(1, 2).flatten(2), weights

    def forward(self, x: Tensor, score: TokenScore | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] -> [B, T, C], and the attention that a token score needs."""
        features, weights = self.features(x, score)
        return self.proj(features), weights


def attend(
    query: Tensor, key: Tensor, value: Tensor, weights: AttentionWeights, score: TokenScore | None
) -> tuple[Tensor, Tensor | None]:
    """Attention of [B, H, T, D] tensors, and as much of its matrix as the score needs."""
    if score == "full":
        matrix = weights(query, key)
        return matrix @ value, matrix
    mixed = F.scaled_dot_product_attention(query, key, value, scale=weights.scale)
    return mixed, weights(query[:, :, :1], key) if score == "cls" else None


class SlimBlock(nn.Module):
    """Pre-norm block that passes on the `keep` best image tokens, chosen between attention and MLP (eq. 8-9)."""

    lowpass: Tensor
    chance: Tensor

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__()
        self.keep_tokens: Callable[[Tensor, Tensor, int], Tensor] = (
            keep_tokens  # deployment has other lowerings of the same selection
        )
        dense, shape = architecture.dense, architecture.blocks[index]
        dim = dense.embed_dim
        self.num_prefix_tokens = dense.num_prefix_tokens
        self.token_cutoff = architecture.token_cutoff
        self.energy_norm: EnergyNorm = architecture.energy_norm
        self.token_score: TokenScore = architecture.token_score
        self.criterion = TOKEN_CRITERIA[architecture.token_criterion]
        self.token_seed = architecture.token_seed + index
        self.norm1 = nn.LayerNorm(dim, eps=dense.norm_eps)
        self.attn = SlimAttention(dim, shape, architecture.qk_scale, dense.qkv_bias)
        self.ls1 = LayerScale(dim) if dense.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=dense.norm_eps)
        self.mlp = Mlp(dim, shape.hidden)
        self.ls2 = LayerScale(dim) if dense.layer_scale else nn.Identity()
        self.set_tokens(architecture.tokens_in(index), shape.keep)

    def set_tokens(self, tokens_in: int, keep: int) -> None:
        """Fix how many image tokens enter and leave; what scores them follows (empty where all are kept)."""
        self.tokens_in, self.keep = tokens_in, keep
        lowpass = chance = torch.empty(0)
        if self.scores_tokens and self.criterion.reads_energy:
            lowpass = token_lowpass_matrix(tokens_in, self.token_cutoff)
        if self.scores_tokens and self.criterion.draws:
            chance = torch.rand(tokens_in, generator=torch.Generator().manual_seed(self.token_seed))
        like = self.norm1.weight
        self.register_buffer("lowpass", lowpass.to(like.device, like.dtype), persistent=False)
        self.register_buffer("chance", chance.to(like.device), persistent=False)

    @property
    def scores_tokens(self) -> bool:
        """Whether this block drops tokens."""
        return self.keep < self.tokens_in

    @property
    def reads_attention(self) -> TokenScore | None:
        """What of its attention this block scores tokens by; `full` keeps attention from running fused."""
        return self.token_score if self.scores_tokens and self.criterion.reads_attention else None

    @property
    def shape(self) -> BlockShape:
        """The block's five numbers, read off its layers."""
        return BlockShape(
            heads=self.attn.num_heads,
            qk_dim=self.attn.qk_dim,
            v_dim=self.attn.v_dim,
            hidden=cast(nn.Linear, self.mlp.fc1).out_features,
            keep=self.keep,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, P + tokens_in, C] -> [B, P + keep, C]."""
        x, weights = self.mix(x)
        if self.scores_tokens:
            x = self.keep_tokens(x, self.scores(x, weights), self.keep)
        return x + self.ls2(self.mlp(self.norm2(x)))

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attention with its residual, all tokens still there, and the attention that their scores read."""
        mixed, weights = self.attn(self.norm1(x), self.reads_attention)
        return x + self.ls1(mixed), weights

    def scores(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Token scores [B, tokens_in] from the tokens as they leave the attention residual and the attention."""
        prefix = self.num_prefix_tokens
        attention = x.new_empty(0) if weights is None else weights
        return self.criterion.score(
            SeenTokens(x[:, prefix:], attention, prefix, self.lowpass, self.chance, self.energy_norm, self.token_score)
        )
