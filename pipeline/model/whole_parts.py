"""Taking a whole part out of a block, its attention or its MLP, and putting what it adds on average in its place.

The mean of what a part adds to the stream is a constant vector. It goes into the nearest bias before the part that
every token passes, where it is as good as in the part's own place: nothing in between reads the stream, but for a
choice of tokens by their energy, which then sees the constant as well. A part that is gone costs a model nothing:
neither parameters nor a kernel.

Related: Variance-Based Pruning (arXiv 2507.12988), which keeps the mean of hidden channels likewise.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.recovery import SMALLEST_SCALE, AddUp, alone, token_weights
from lowpass.pipeline.model.architecture import DenseViT
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT

Part = Literal["attention", "mlp"]


def missing_parts(block: SlimBlock, shape: BlockShape) -> tuple[Part, ...]:
    """What `block` has and a block of `shape` has not, attention first."""
    attention: tuple[Part, ...] = ("attention",) if block.has_attention and not shape.heads else ()
    mlp: tuple[Part, ...] = ("mlp",) if block.has_mlp and not shape.hidden else ()
    return attention + mlp


@torch.no_grad()
def mean_added(
    block: SlimBlock, dense: DenseViT, last: bool, part: Part, entering: Iterable[Tensor], add_up: AddUp = alone
) -> Tensor:
    """What a part adds to the stream on average, behind its layer scale: [C] FP64.

    Tokens count as they do in recovery (`token_weights`): CLS as much as all image tokens where it stands for the
    image, and leaving the last block what the classifier reads alone.

    Args:
        block: whose part it is, in evaluation mode.
        dense: the model's description.
        last: whether it is the model's last block.
        part: which of its parts.
        entering: what enters the block [B, P + N, C], a batch at a time, on the block's device.
        add_up: adds up what several processes found.

    Raises:
        ValueError: there are no batches.
    """
    sum_, weight = torch.zeros(dense.embed_dim, dtype=torch.float64), 0.0
    for tokens in entering:
        if part == "attention":
            added = block.ls1(block.attn(block.normed(tokens), None, *block.stream.places(tokens))[0])
        else:
            added = block.ls2(block.mlp(block.hidden_input(block.select(*block.mix(tokens)))))
        weights = token_weights(added.shape[1], dense.num_prefix_tokens, dense.readout, last, added).double()
        sum_ += (added.double() * weights[:, None]).sum((0, 1)).cpu()
        weight += len(added) * float(weights.sum())
    sums = add_up((sum_, torch.tensor(weight, dtype=torch.float64)))
    if sums is None or not sums[1]:
        raise ValueError("the mean of what a part adds needs at least one batch")
    return sums[0] / sums[1]


@torch.no_grad()
def take_out(block: SlimBlock, part: Part, added: Tensor) -> Tensor | None:
    """Take a part out of a block, in place; the constant `added` [C] takes its place.

    In place of an MLP it goes into the bias of the projection of the same block's attention, where there is one. Layer
    scale multiplies such a bias: the constant is divided by it, and a channel that it switches off gets a scale of 1,
    its old one multiplied into the layer's weights.

    Returns:
        The constant, where nothing is left in the block that could take it: it has to enter the block.

    Raises:
        ValueError: the block does not have the part, or attention is to go that chooses tokens.
    """
    if not (block.has_attention if part == "attention" else block.has_mlp):
        raise ValueError(f"the block has no {part} that could be removed")
    if part == "attention":
        if block.scores_tokens:
            raise ValueError("the block drops tokens, for which it needs its attention")
        del block.norm1, block.attn, block.ls1
        return added
    del block.norm2, block.mlp, block.ls2
    if not block.has_attention:
        return added
    _add_to_bias(block.attn.proj, block.ls1, added)
    return None


@torch.no_grad()
def add_below(model: SlimViT, index: int, added: Tensor) -> int | None:
    """Add the constant `added` [C] to what enters a block, in place.

    It goes into the bias of what last adds to the stream below, as in `take_out`. Where there is nothing but the
    embedding, that is the norm in front of the blocks, where there is one, or else the bias of the patches, CLS and the
    other prefix tokens, each.

    Returns:
        The block whose bias took the constant; None: it is the embedding.
    """
    for below in range(index - 1, -1, -1):
        earlier = model.blocks[below]
        if earlier.has_mlp:
            _add_to_bias(earlier.mlp.fc2, earlier.ls2, added)
            return below
        if earlier.has_attention:
            _add_to_bias(earlier.attn.proj, earlier.ls1, added)
            return below
    _add_to_embedding(model.vit, added)
    return None


def _add_to_bias(layer: nn.Linear, scale: nn.Module, added: Tensor) -> None:
    added = added.to(layer.bias.device, torch.float64)
    if isinstance(scale, LayerScale):
        off = scale.gamma.abs() <= SMALLEST_SCALE
        layer.weight[off] *= scale.gamma[off, None]
        layer.bias[off] *= scale.gamma[off]
        scale.gamma[off] = 1
        added = added / scale.gamma.double()
    layer.bias.copy_(layer.bias.double() + added)


def _add_to_embedding(vit: Any, added: Tensor) -> None:
    """To every token as it enters the first block: positions are not given to prefix tokens in all models."""
    if isinstance(vit.norm_pre, nn.LayerNorm):
        taking = [vit.norm_pre.bias]
    else:
        taking = [vit.patch_embed.proj.bias]
        for name in ("cls_token", "dist_token", "reg_token"):
            token = getattr(vit, name, None)
            taking += [] if token is None else [token]
    for parameter in taking:
        parameter.copy_(parameter.double() + added.to(parameter.device, torch.float64))
