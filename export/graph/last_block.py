"""The last block with attention, for the tokens alone that the classifier reads."""

from typing import Any, Literal, cast

from torch import Tensor, nn

from lowpass.export.graph.attention import by_head, stacked, taking_bias, unbiased
from lowpass.export.graph.rotary import Turning
from lowpass.pipeline.model.slim_block import SlimBlock

LastProducts = Literal["query apart", "one", "one, heads first"]


class LastBlock(nn.Module):
    """The last block with attention for the tokens alone that the classifier reads, the first `rows`: [B, T, C] ->
    [B, rows, C]. Blocks above it, which have an MLP or nothing, then get no others. Where no block has attention it is
    the first, and cuts the other tokens off.

    Exact: what other tokens would become there is never read, and so none need be dropped there either. A row or two of
    attention are written out: TensorRT has no fused kernel for so few.

    `products` says how query, key and value are computed. For CPUs the query apart, of the tokens alone that are read.
    For TensorRT the other tokens' queries as well, in one product with keys and values. That is more to multiply and
    less to run: of tokens cut before the product it makes kernels of their own, and two of the norm. In 8 bits heads of
    one size are set apart all at once: one kernel in FP8, in place of three. FP16 reads the parts where they are.

    Rotary positions turn keys alone here: the classifier reads prefix tokens, whose queries are not turned.
    """

    def __init__(self, block: SlimBlock, rows: int, products: LastProducts) -> None:
        super().__init__()
        self.rows, self.products, self.stream = rows, products, block.stream
        self.has_attention, self.has_mlp = block.has_attention, block.has_mlp
        if block.has_mlp:
            self.norm2, self.mlp, self.ls2 = block.norm2, block.mlp, block.ls2
        if not block.has_attention:
            return
        attention = block.attn
        self.norm1, self.ls1 = block.norm1, block.ls1
        self.num_heads, self.weights = attention.num_heads, attention.weights
        self.proj = taking_bias(attention.proj, attention.value)  # see `RowAttention`
        self.turning = Turning(attention, attention.qk_dim) if attention.rotary else None
        # What turns a key turns its bias, which then differs from token to token.
        key = attention.key if attention.rotary else unbiased(attention.key)
        key_value = [(key, attention.qk_dim), (unbiased(attention.value), attention.v_dim)]
        self.sizes = [attention.query.out_features, self.proj.in_features]
        if products == "query apart":
            self.query, self.key_value = attention.query, stacked(self.num_heads, *key_value)
        else:
            self.qkv = stacked(self.num_heads, (attention.query, attention.qk_dim), *key_value)

    def forward(self, stream: Any) -> Tensor:
        """All tokens that enter -> those that are read."""
        kept = self.stream.tokens(stream)[:, : self.rows]
        if self.has_attention:
            kept = kept + self.ls1(self._mixed(stream))
        return cast(Tensor, kept + self.ls2(self.mlp(self.norm2(kept)))) if self.has_mlp else kept

    def _mixed(self, stream: Any) -> Tensor:
        """What attention gives the tokens that are read."""
        places, normed = self.stream.places(stream), self.norm1(self.stream.tokens(stream))
        query, key, value = self._heads(normed)
        if self.turning is not None:
            (key,) = self.turning(*(places or (None,)), key)
        mixed = self.weights(query[:, :, : self.rows], key) @ value
        return cast(Tensor, self.proj(mixed.transpose(1, 2).flatten(2)))

    def _heads(self, normed: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value [B, H, T, d], of the query at least the rows that are read."""
        if self.products == "query apart":
            parts = (self.query(normed[:, : self.rows]), *self.key_value(normed).split(self.sizes, -1))
        elif self.products == "one, heads first" and self.sizes[0] == self.sizes[1]:
            return by_head(self.qkv(normed), 3 * self.num_heads).split(self.num_heads, 1)
        else:
            parts = self.qkv(normed).split([self.sizes[0], *self.sizes], -1)
        return tuple(by_head(part, self.num_heads) for part in parts)
