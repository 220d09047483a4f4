"""The last block, for the tokens alone that the classifier reads."""

from typing import cast

from torch import Tensor, nn

from lowpass.export.graph.attention import by_head, stacked, taking_bias, unbiased
from lowpass.pipeline.model.slim_block import SlimBlock


class LastBlock(nn.Module):
    """The last block for the tokens alone that the classifier reads, the first `rows`: [B, T, C] -> [B, rows, C].

    Exact: what other tokens would become there is never read, and so none need be dropped there either. A row or two of
    attention are written out: TensorRT has no fused kernel for so few.
    """

    def __init__(self, block: SlimBlock, rows: int) -> None:
        super().__init__()
        attention = block.attn
        self.rows, self.num_heads = rows, attention.num_heads
        self.norm1, self.ls1, self.norm2, self.mlp, self.ls2 = block.norm1, block.ls1, block.norm2, block.mlp, block.ls2
        self.query, self.weights = attention.query, attention.weights
        self.proj = taking_bias(attention.proj, attention.value)  # see `RowAttention`
        parts = [(attention.key, attention.qk_dim), (attention.value, attention.v_dim)]
        self.key_value = stacked(self.num_heads, *((unbiased(layer), size) for layer, size in parts))

    def forward(self, x: Tensor) -> Tensor:
        """All tokens that enter -> those that are read."""
        kept, normed = x[:, : self.rows], self.norm1(x)
        sizes = [self.query.out_features, self.proj.in_features]
        query, key, value = (
            by_head(part, self.num_heads)
            for part in (self.query(normed[:, : self.rows]), *self.key_value(normed).split(sizes, -1))
        )
        mixed = self.weights(query, key) @ value
        kept = kept + self.ls1(self.proj(mixed.transpose(1, 2).flatten(2)))
        return cast(Tensor, kept + self.ls2(self.mlp(self.norm2(kept))))
