"""What channels are scored by, run on a model: LFS (the method, eq. 3-5) and its rivals.

A new criterion is one function here and one line of `CHANNEL_CRITERIA`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from timm.layers import LayerScale
from torch import Tensor, nn

from lowpass.pipeline.method.frequency import lowpass_images
from lowpass.pipeline.method.recovery import token_weights
from lowpass.pipeline.method.sensitivity import ChannelCriterion, ChannelScores, channel_scores, sensitivity_loss
from lowpass.pipeline.method.structured_obs import logit_gram, removal_costs
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT

OBSERVED_TOKENS = 65_536  # that structured OBS looks at: some fifty for each channel
Stream = tuple[Tensor, Tensor, Tensor]  # tokens of clean images, tokens of low-passed images, labels


def low_frequency_sensitivity(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    block: int,
    cutoff: float = 0.1,
    weight: float = 0.1,
) -> ChannelScores:
    """LFS of one block of the model as it stands now.

    With low-passed images X~, `g` is the gradient of `weight * CE(model(X~), y) + (1 - weight) * KL(softmax(T) ||
    softmax(T~))`, where T and T~ are the CLS token leaving the block for X (no gradient) and for X~ and KL is summed
    and divided by the number of elements (eq. 3-4); a model that averages its image tokens has their mean for T.
    Gradients are averaged over the batches; a channel's score is the sum over its weight row of `(g * weight)^2`, bias
    left out (eq. 5).

    Args:
        model: a SlimViT, or a plain dense timm ViT.
        batches: (images [B, C, H, W], labels [B]); moved to the model's device.
        block: index of the block to score, from the bottom.
        cutoff: image cutoff in cycles per pixel.
        weight: share of the cross-entropy, in [0, 1].

    Raises:
        ValueError: there are no batches.
        InputError: `model` is not a plain ViT.

    Example:
        >>> from lowpass.pipeline.checkpoints.load import load_model
        >>> batches = [(torch.rand(4, 3, 32, 32), torch.tensor([3, 1, 4, 1]))]
        >>> scores = low_frequency_sensitivity(load_model("digits_deit"), batches, block=0)
        >>> scores.query_key.shape, scores.value.shape, scores.hidden.shape
        (torch.Size([3, 32]), torch.Size([3, 32]), torch.Size([384]))
    """
    slim = model if isinstance(model, SlimViT) else SlimViT.from_timm(model)
    device = next(slim.parameters()).device

    def streams() -> Iterator[Stream]:
        for images, labels in batches:
            images = images.to(device)
            with torch.no_grad():
                clean, low = (_below(slim, seen, block) for seen in (images, lowpass_images(images, cutoff)))
            yield clean, low, labels.to(device)

    training = slim.training
    scores = sensitivity_from(slim.eval(), streams(), block, weight)
    slim.train(training)
    return scores


def sensitivity_from(slim: SlimViT, streams: Iterable[Stream], block: int, weight: float) -> ChannelScores:
    """`low_frequency_sensitivity` from what enters the block: a search keeps it, since the blocks below are final.

    Args:
        slim: in evaluation mode.
        streams: tokens [B, P + N, C] of the images and of the low-passed images, and labels [B], on the model's device.
        block: index of the block to score.
        weight: share of the cross-entropy, in [0, 1].

    Raises:
        ValueError: there are no batches.
    """
    layers = _layers(slim, block)
    total = [torch.zeros_like(layer.weight) for layer in layers]
    count = 0
    for clean, low, labels in streams:
        loss = _loss(slim, clean, low, labels, block, weight)
        for sum_, gradient in zip(total, torch.autograd.grad(loss, [layer.weight for layer in layers]), strict=True):
            sum_ += gradient
        count += 1
    if not count:
        raise ValueError("channel sensitivity needs at least one batch")
    products = (gradient / count * layer.weight.detach() for gradient, layer in zip(total, layers, strict=True))
    return channel_scores(products, slim.blocks[block].attn.num_heads)


def taylor(slim: SlimViT, streams: Iterable[Stream], block: int) -> ChannelScores:
    """First-order Taylor saliency as in NViT (Yang et al., 2023): LFS's sum with the gradient of the cross-entropy on
    unfiltered images. See `sensitivity_from`."""
    unfiltered = ((clean, clean, labels) for clean, _, labels in streams)
    return sensitivity_from(slim, unfiltered, block, weight=1.0)


def obs(slim: SlimViT, streams: Iterable[Stream], block: int) -> ChannelScores:
    """Structured OBS (`method/structured_obs.py`): value and hidden channels and heads by what the projection and the
    second MLP layer lose that a refit does not give back, query-key pairs by the logits. See `sensitivity_from`.

    Scores of a kind are divided by their mean: a logit and a token have no unit in common.

    Raises:
        ValueError: there are no batches.
    """
    part, dense = slim.blocks[block], slim.architecture.dense
    attention, reader = part.attn, cast(nn.Linear, part.mlp.fc2)
    last = block == len(slim.blocks) - 1
    read = (dense.reads_prefix_tokens, dense.reads_image_tokens) if last else None
    sums = list[Tensor]()
    seen = 0
    with torch.no_grad():
        for clean, _, _ in streams:
            if seen >= OBSERVED_TOKENS:
                break
            seen += clean.shape[0] * clean.shape[1]
            found = _moments(part, clean, read, not dense.mean_readout)
            sums = [one + two for one, two in zip(sums, found, strict=True)] if sums else list(found)
    if not sums:
        raise ValueError("channel sensitivity needs at least one batch")
    logits, mixed, hidden = sums
    heads, size = attention.num_heads, attention.v_dim
    value_weight, hidden_weight = (_with_bias(attention.proj, part.ls1), _with_bias(reader, part.ls2))
    ones = torch.ones(1, logits.shape[-1], device=logits.device)
    pairs = torch.stack([removal_costs(gram, ones) for gram in logits])
    values = removal_costs(mixed, value_weight, always=1).unflatten(0, (heads, size))
    whole = removal_costs(mixed, value_weight, group=size, always=1)
    scores = (pairs, values, removal_costs(hidden, hidden_weight, always=1), whole)
    return ChannelScores(*((score / score.mean().clamp_min(1e-300)).float().cpu() for score in scores))


def magnitude(slim: SlimViT, block: int) -> ChannelScores:
    """The squared L2 norm of each weight row."""
    return channel_scores((layer.weight.detach() for layer in _layers(slim, block)), slim.blocks[block].attn.num_heads)


def random_scores(slim: SlimViT, block: int, seed: int) -> ChannelScores:
    """Uniform noise: the floor for any criterion."""
    generator = torch.Generator().manual_seed(seed * len(slim.blocks) + block)
    attention, hidden = slim.blocks[block].attn, cast(nn.Linear, slim.blocks[block].mlp.fc1)
    sizes = ((attention.num_heads, attention.qk_dim), (attention.num_heads, attention.v_dim), (hidden.out_features,))
    return ChannelScores(*(torch.rand(size, generator=generator) for size in sizes))


# From the model, what enters the block, the block's index, the share of the cross-entropy (LFS) and a seed.
CHANNEL_CRITERIA: dict[ChannelCriterion, Callable[[SlimViT, Iterable[Stream], int, float, int], ChannelScores]] = {
    "lfs": lambda slim, streams, block, weight, _seed: sensitivity_from(slim, streams, block, weight),
    "obs": lambda slim, streams, block, _weight, _seed: obs(slim, streams, block),
    "taylor": lambda slim, streams, block, _weight, _seed: taylor(slim, streams, block),
    "magnitude": lambda slim, _streams, block, _weight, _seed: magnitude(slim, block),
    "random": lambda slim, _streams, block, _weight, seed: random_scores(slim, block, seed),
}


def _moments(
    block: SlimBlock, tokens: Tensor, read: tuple[bool, bool] | None, cls_readout: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a batch, FP64: of the logits of each head [H, Dqk, Dqk], and of what the projection [H * Dv + 1, ...] and the
    second MLP layer read [M + 1, ...], a constant 1 at the end."""
    normed = block.norm1(tokens)
    query, key = (
        layer(normed).unflatten(-1, (block.attn.num_heads, -1)).transpose(1, 2)
        for layer in (block.attn.query, block.attn.key)
    )
    mixed, attention = block.attn.features(normed, block.reads_attention)
    middle = tokens + block.ls1(block.attn.proj(mixed))
    if block.scores_tokens:
        middle = block.keep_tokens(middle, block.scores(middle, attention), block.keep)
    hidden = block.mlp.norm(block.mlp.act(block.mlp.fc1(block.norm2(middle))))

    def weights(like: Tensor) -> Tensor:
        return token_weights(like.shape[1], block.num_prefix_tokens, read, cls_readout, like)

    def second(features: Tensor) -> Tensor:
        rows = torch.cat([features, features.new_ones(*features.shape[:2], 1)], 2)
        return ((rows * weights(features)[:, None]).flatten(0, 1).T @ rows.flatten(0, 1)).double()

    return logit_gram(query, key, weights(tokens)).double(), second(mixed), second(hidden)


def _with_bias(layer: nn.Linear, scale: nn.Module) -> Tensor:
    """[C, k + 1]: what the layer adds to the stream, its bias last."""
    weight = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)
    return weight * cast(Tensor, scale.gamma).detach()[:, None] if isinstance(scale, LayerScale) else weight


def _layers(slim: SlimViT, block: int) -> list[nn.Linear]:
    attention = slim.blocks[block].attn
    return [attention.query, attention.key, attention.value, cast(nn.Linear, slim.blocks[block].mlp.fc1)]


def _loss(slim: SlimViT, clean: Tensor, low: Tensor, labels: Tensor, block: int, weight: float) -> Tensor:
    """Eq. 3-4 for one batch; only what lies above the scored block is differentiated."""
    with torch.no_grad():
        wanted = slim.summary(slim.blocks[block](clean))
    low = slim.blocks[block](low)
    leaving = slim.summary(low)
    for later in slim.blocks[block + 1 :]:
        low = later(low)
    return sensitivity_loss(slim.classify(low), labels, wanted, leaving, weight)


def _below(slim: SlimViT, images: Tensor, block: int) -> Tensor:
    """Tokens that enter `block`."""
    tokens = slim.embed(images)
    for earlier in slim.blocks[:block]:
        tokens = earlier(tokens)
    return tokens
