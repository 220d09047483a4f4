"""The last block, for the tokens alone that the classifier reads."""

from typing import Any, cast

from torch import Tensor, nn

from lowpass.export.graph.attention import by_head, stacked, taking_bias, unbiased
from lowpass.export.graph.rotary import Turning
from lowpass.pipeline.model.slim_block import SlimBlock


class LastBlock(nn.Module):
    """The last block for the tokens alone that the classifier reads, the first `rows`: [B, T, C] -> [B, rows, C].

    Exact: what other tokens would become there is never read, and so none need be dropped there either. A row or two of
    attention are written out: TensorRT has no fused kernel for so few.

    `whole_query` computes the other tokens' queries as well, in one product with keys and values. That is more to
    multiply and less to run: of tokens cut before the product TensorRT makes kernels of their own, and two of the norm.

    Rotary positions turn keys alone here: the classifier reads prefix tokens, whose queries are not turned.
    """

    def __init__(self, block: SlimBlock, rows: int, whole_query: bool) -> None:
        super().__init__()
        attention = block.attn
        self.rows, self.num_heads, self.whole_query = rows, attention.num_heads, whole_query
        self.norm1, self.ls1, self.norm2, self.mlp, self.ls2 = block.norm1, block.ls1, block.norm2, block.mlp, block.ls2
        self.weights, self.stream = attention.weights, block.stream
        self.proj = taking_bias(attention.proj, attention.value)  # see `RowAttention`
        self.turning = Turning(attention, attention.qk_dim) if attention.rotary else None
        # What turns a key turns its bias, which then differs from token to token.
        key = attention.key if attention.rotary else unbiased(attention.key)
        key_value = [(key, attention.qk_dim), (unbiased(attention.value), attention.v_dim)]
        self.sizes = [attention.query.out_features, self.proj.in_features]
        if whole_query:
            self.qkv = stacked(self.num_heads, (attention.query, attention.qk_dim), *key_value)
        else:
            self.query, self.key_value = attention.query, stacked(self.num_heads, *key_value)

    def forward(self, stream: Any) -> Tensor:
        """All tokens that enter -> those that are read."""
        x, places = self.stream.tokens(stream), self.stream.places(stream)
        kept, normed = x[:, : self.rows], self.norm1(x)
        if self.whole_query:
            parts = self.qkv(normed).split([self.sizes[0], *self.sizes], -1)
        else:
            parts = (self.query(normed[:, : self.rows]), *self.key_value(normed).split(self.sizes, -1))
        query, key, value = (by_head(part, self.num_heads) for part in parts)
        if self.turning is not None:
            (key,) = self.turning(*(places or (None,)), key)
        mixed = self.weights(query[:, :, : self.rows], key) @ value
        kept = kept + self.ls1(self.proj(mixed.transpose(1, 2).flatten(2)))
        return cast(Tensor, kept + self.ls2(self.mlp(self.norm2(kept))))
