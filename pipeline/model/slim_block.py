"""One block of the slim ViT: its heads, widths and token count are its own."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.frequency import token_lowpass_matrix
from lowpass.pipeline.method.rotary import rotary_table
from lowpass.pipeline.method.token_choices import READING_ENERGY, EnergyNorm, TokenScore
from lowpass.pipeline.method.token_scores import TOKEN_CRITERIA, SeenTokens, keep_tokens
from lowpass.pipeline.model.architecture import Architecture, DenseViT
from lowpass.pipeline.model.slim_attention import DifferentialAttention, SlimAttention
from lowpass.pipeline.model.slim_mlp import SlimMlp
from lowpass.pipeline.model.stream import PlacedStream, PlainStream, Stream


class SlimBlock(nn.Module):
    """Pre-norm block that passes on the `keep` best image tokens, chosen between attention and MLP (eq. 8-9).

    A shape without attention, or without an MLP, leaves nothing of it: neither the part nor its norm nor its layer
    scale is there to be read. Without attention all tokens are passed on.
    """

    lowpass: Tensor
    chance: Tensor
    attn: SlimAttention
    norm1: nn.LayerNorm
    ls1: nn.Module
    mlp: SlimMlp
    norm2: nn.LayerNorm
    ls2: nn.Module

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__()
        # Deployment has other lowerings of the same stream, the same scores and the same selection.
        self.stream: Stream = stream_of(architecture.dense)
        self.seen_tokens: type[SeenTokens] = SeenTokens
        self.keep_tokens: Callable[[Tensor, Tensor, int], Tensor] = keep_tokens
        dense, shape = architecture.dense, architecture.blocks[index]
        dim = dense.embed_dim
        self.num_prefix_tokens = dense.num_prefix_tokens
        self.token_cutoff = architecture.token_cutoff
        self.energy_norm: EnergyNorm = architecture.energy_norm
        self.token_score: TokenScore = architecture.token_score
        self.criterion = TOKEN_CRITERIA[architecture.token_criterion]
        self.reads_energy = architecture.token_criterion in READING_ENERGY
        self.token_seed = architecture.token_seed + index
        self.mean_readout = dense.mean_readout
        layer_norm = partial(nn.LayerNorm, eps=dense.norm_eps)
        if shape.heads:
            self.norm1 = layer_norm(dim)
            self.attn = _attention(dense, shape, architecture.qk_scale, index)
            self.ls1 = LayerScale(dim) if dense.layer_scale else nn.Identity()
        if shape.hidden:
            self.norm2 = layer_norm(dim)
            norm = layer_norm(shape.hidden) if dense.mlp_norm else None
            self.mlp = SlimMlp(dim, shape.hidden, dense.activation, dense.gated, norm)
            self.ls2 = LayerScale(dim) if dense.layer_scale else nn.Identity()
        self.set_tokens(architecture.tokens_in(index), shape.keep)

    def set_tokens(self, tokens_in: int, keep: int) -> None:
        """Fix how many image tokens enter and leave; what scores them follows (empty where all are kept).

        Raises:
            ValueError: tokens are to go from a block without attention, which has nothing to choose them by.
        """
        if keep < tokens_in and not self.has_attention:
            raise ValueError(f"a block without attention passes on all {tokens_in} image tokens, not {keep}")
        self.tokens_in, self.keep = tokens_in, keep
        lowpass = chance = torch.empty(0)
        if self.scores_tokens and self.reads_energy:
            lowpass = token_lowpass_matrix(tokens_in, self.token_cutoff).clone()  # that one is every model's
        if self.scores_tokens and self.criterion.draws:
            chance = torch.rand(tokens_in, generator=torch.Generator().manual_seed(self.token_seed))
        like = next(self.parameters(), torch.empty(0))  # a block of nothing has none
        self.register_buffer("lowpass", lowpass.to(like.device, like.dtype), persistent=False)
        self.register_buffer("chance", chance.to(like.device), persistent=False)

    @property
    def has_attention(self) -> bool:
        """Whether this block has attention, its norm and its layer scale."""
        return hasattr(self, "attn")

    @property
    def has_mlp(self) -> bool:
        """Whether this block has an MLP, its norm and its layer scale."""
        return hasattr(self, "mlp")

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
            heads=self.attn.num_heads if self.has_attention else 0,
            qk_dim=self.attn.qk_dim if self.has_attention else 0,
            v_dim=self.attn.v_dim if self.has_attention else 0,
            hidden=self.mlp.fc1.out_features if self.has_mlp else 0,
            keep=self.keep,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, P + tokens_in, C] -> [B, P + keep, C], with places where positions are rotary (see `stream.py`)."""
        return self.feed(self.select(*self.mix(x)))

    def normed(self, x: Tensor) -> Tensor:
        """What query, key and value read [B, T, C]."""
        return cast(Tensor, self.norm1(self.stream.tokens(x)))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the projection reads [B, T, H * v_dim], and the attention that the tokens' scores read."""
        return self.attn.features(self.normed(x), self.reads_attention, *self.stream.places(x))

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attention with its residual, all tokens still there, and the attention that their scores read; what came in
        where there is no attention."""
        if not self.has_attention:
            return x, None
        mixed, weights = self.attn(self.normed(x), self.reads_attention, *self.stream.places(x))
        return self.stream.add(x, self.ls1(mixed)), weights

    def select(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """The tokens that stay, of those that `mix` gives."""
        return self.keep_tokens(x, self.scores(x, weights), self.keep) if self.scores_tokens else x

    def hidden_input(self, x: Tensor) -> Tensor:
        """What the MLP reads [B, T, C]."""
        return cast(Tensor, self.norm2(self.stream.tokens(x)))

    def feed(self, x: Tensor) -> Tensor:
        """The MLP with its residual; what came in where there is no MLP."""
        if not self.has_mlp:
            return x
        return cast(Tensor, self.stream.add(x, self.ls2(self.mlp(self.hidden_input(x)))))

    def scores(self, x: Tensor, weights: Tensor | None) -> Tensor:
        """Token scores [B, tokens_in] from the tokens as they leave the attention residual and the attention."""
        tokens = self.stream.tokens(x)
        attention = tokens.new_empty(0) if weights is None else weights
        return self.criterion.score(
            self.seen_tokens(
                tokens,
                attention,
                self.num_prefix_tokens,
                self.lowpass,
                self.chance,
                self.energy_norm,
                self.token_score,
                self.mean_readout,
            )
        )


def _attention(dense: DenseViT, shape: BlockShape, scale: float, index: int) -> SlimAttention:
    if dense.differential:
        return DifferentialAttention(dense.embed_dim, shape, scale, dense.qkv_bias, index)
    norm = nn.LayerNorm(shape.heads * shape.v_dim, eps=dense.norm_eps) if dense.attn_norm else None
    table = None
    if dense.rotary is not None:
        table = rotary_table(dense.rotary, dense.grid, dense.blocks()[0].qk_dim // 2, dense.num_prefix_tokens)
    return SlimAttention(dense.embed_dim, shape, scale, dense.qkv_bias, norm, table)


def stream_of(dense: DenseViT) -> Stream:
    """How a model's tokens run from block to block."""
    return PlainStream() if dense.rotary is None else PlacedStream(dense.num_prefix_tokens, dense.grid)


def layer_scale(scale: nn.Module) -> Tensor | None:
    """What a block multiplies a layer's channels by [C]; None: nothing."""
    return cast(Tensor, scale.gamma).detach() if isinstance(scale, LayerScale) else None
