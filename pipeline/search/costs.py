"""What a block costs, in MACs or in milliseconds measured on a runtime: what a target is planned by."""

from typing import Protocol

from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture


class Costs(Protocol):
    """Of one image, or of one batch. Tokens count the prefix tokens in, except where it says image tokens. `last`: of
    the last block with attention and of those above it, of which a deployed graph computes no more than the classifier
    reads. A part that a block does not have costs nothing."""

    def ends(self) -> float:
        """Patch embedding and classifier."""

    def attention(self, tokens: int, shape: BlockShape, last: bool) -> float:
        """Query, key, value, their products, and the projection; the norm and the residual."""

    def mlp(self, tokens: int, hidden: int, last: bool) -> float:
        """Both layers, the norm and the residual."""

    def selection(self, image_tokens: int, last: bool) -> float:
        """Scoring that many tokens and dropping some."""


def total(costs: Costs, architecture: Architecture) -> float:
    """The cost of a whole model."""
    prefix, sum_ = architecture.dense.num_prefix_tokens, costs.ends()
    for index, block in enumerate(architecture.blocks):
        image_tokens, last = architecture.tokens_in(index), index >= architecture.last_attention
        sum_ += costs.attention(image_tokens + prefix, block, last) + costs.mlp(block.keep + prefix, block.hidden, last)
        if block.keep < image_tokens:
            sum_ += costs.selection(image_tokens, last)
    return sum_


class Macs:
    """Multiply-accumulates of one image; `total` is `Architecture.macs`, which counts the last block like any other, as
    all that is published does."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture, self.dense = architecture, architecture.dense

    def ends(self) -> float:
        """See `Costs`."""
        return self.dense.end_macs()

    def attention(self, tokens: int, shape: BlockShape, last: bool) -> float:
        """See `Costs`."""
        return self.dense.attention_macs(tokens, shape)

    def mlp(self, tokens: int, hidden: int, last: bool) -> float:
        """See `Costs`."""
        return self.dense.mlp_macs(tokens, hidden)

    def selection(self, image_tokens: int, last: bool) -> float:
        """See `Costs`."""
        return self.architecture.selection_macs(image_tokens)
