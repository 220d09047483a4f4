"""Rotary positions as deployed: a table of angles a block, of which each token has its row.

Until a block drops tokens, rows are in order and the table is a constant of the graph. From then on the rows of the
tokens that stay go along, as numbers, and each block gathers by them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowpass.export.graph.attention import FusedAttention, Products, stacked
from lowpass.export.graph.selection import kept_rows, take_rows
from lowpass.pipeline.method.rotary import rotate
from lowpass.pipeline.model.slim_attention import SlimAttention


class RowsStream:
    """Tokens [B, T, C] while all are there; then with their rows of the table, [B, T]. See `Stream`."""

    def begin(self, tokens: Tensor) -> Tensor:
        """See `Stream`."""
        return tokens

    def tokens(self, stream: Any) -> Tensor:
        """See `Stream`."""
        return stream[0] if isinstance(stream, tuple) else stream

    def add(self, stream: Any, branch: Tensor) -> Any:
        """See `Stream`."""
        return (stream[0] + branch, stream[1]) if isinstance(stream, tuple) else stream + branch

    def places(self, stream: Any) -> tuple[Tensor, ...]:
        """See `Stream`."""
        return (stream[1],) if isinstance(stream, tuple) else ()


def gather_with_rows(stream: Any, scores: Tensor, keep: int, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """`gather_tokens` for a `RowsStream`: tokens and their rows go by the same index."""
    tokens, rows = stream if isinstance(stream, tuple) else (stream, None)
    kept = kept_rows(tokens, scores, keep, ordered)
    return take_rows(tokens, kept), kept if rows is None else rows.gather(1, kept)


class Turning(nn.Module):
    """Turns queries and keys [B, H, T, d] by their tokens' angles. Heads that have the same pairs share a table."""

    table: Tensor

    def __init__(self, attention: SlimAttention, size: int) -> None:
        super().__init__()
        pairs = attention.pairs
        pairs = pairs[:1] if bool((pairs == pairs[:1]).all()) else pairs
        cosine, sine = attention.table[:, :, pairs]  # [T, H or 1, d / 2]
        more = size // 2 - pairs.shape[1]  # channels of zeros, which nothing turns
        self.register_buffer("table", torch.cat([_widened(cosine, more, 1), _widened(sine, more, 0)], -1))

    def forward(self, places: Tensor | None, *heads: Tensor) -> tuple[Tensor, ...]:
        """`heads` turned; `places` [B, T] are rows of the table, None: all of them."""
        rows = self.table[None] if places is None else self.table[places]  # [B or 1, T, H or 1, d]
        cosine, sine = rows.transpose(1, 2).chunk(2, -1)
        return tuple(rotate(part, cosine, sine) for part in heads)


def _widened(angles: Tensor, more: int, value: int) -> Tensor:
    return nn.functional.pad(angles, (0, more), value=value)


class RotaryAttention(FusedAttention):
    """`FusedAttention` with rotary positions."""

    def __init__(self, attention: SlimAttention, head_dim: int | None, products: Products, gives_logits: bool) -> None:
        size = head_dim or attention.qk_dim
        turning = Turning(attention, size)
        # Zeros go behind each half of a head: (i, i + d / 2) are a pair at any size.
        halves = 2 * attention.num_heads
        attention.query, attention.key = (
            stacked(halves, (layer, size // 2)) for layer in (attention.query, attention.key)
        )
        super().__init__(attention, head_dim, products, gives_logits)
        self.turning = turning

    def _heads(self, x: Tensor, places: Tensor | None = None) -> tuple[Tensor, ...]:
        query, key, value = super()._heads(x)
        return *self.turning(places, query, key), value
