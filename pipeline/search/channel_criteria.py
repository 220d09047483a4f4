"""What channels are scored by, run on a model: LFS (the method, eq. 3-5) and its rivals.

A new criterion is one function here, one line of `CHANNEL_CRITERIA` and its name where `docs/developers.md` says.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowpass.pipeline.method.frequency import lowpass_images
from lowpass.pipeline.method.recovery import AddUp, alone
from lowpass.pipeline.method.sensitivity import ChannelCriterion, ChannelScores, channel_scores, sensitivity_loss
from lowpass.pipeline.method.structured_obs import BlockMetric
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.obs_scores import check_scored, obs

SEE_LOW_PASSED: frozenset[ChannelCriterion] = frozenset({"lfs"})
ScoringBatch = tuple[Tensor, Tensor, Tensor]  # tokens of clean images, tokens of low-passed images, labels


@dataclass(frozen=True)
class CriterionContext:
    """What a criterion is given beside the model and what enters the block: `weight`, the share of the cross-entropy in
    LFS; `seed`, of random scores; `metric`, in which structured OBS measures errors, None: all channels of the stream
    count the same. Where several processes have a share of the batches each: `starts`, how many images there are before
    each of this one's, and `add_up`, which adds up what all of them found."""

    weight: float = 0.1
    seed: int = 0
    metric: BlockMetric | None = None
    starts: Sequence[int] | None = None
    add_up: AddUp = alone


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
        InputError: `model` is not a plain ViT, or the block lacks its attention or its MLP.

    Example:
        >>> from lowpass.pipeline.checkpoints.load import load_model
        >>> batches = [(torch.rand(4, 3, 32, 32), torch.tensor([3, 1, 4, 1]))]
        >>> scores = low_frequency_sensitivity(load_model("digits_deit"), batches, block=0)
        >>> scores.query_key.shape, scores.value.shape, scores.hidden.shape
        (torch.Size([3, 32]), torch.Size([3, 32]), torch.Size([384]))
    """
    slim = model if isinstance(model, SlimViT) else SlimViT.from_timm(model)
    device = next(slim.parameters()).device

    def streams() -> Iterator[ScoringBatch]:
        for images, labels in batches:
            images = images.to(device)
            with torch.no_grad():
                clean, low = (_below(slim, seen, block) for seen in (images, lowpass_images(images, cutoff)))
            yield clean, low, labels.to(device)

    training = slim.training
    scores = sensitivity_from(slim.eval(), streams(), block, weight)
    slim.train(training)
    return scores


def sensitivity_from(
    slim: SlimViT, streams: Iterable[ScoringBatch], block: int, weight: float, add_up: AddUp = alone
) -> ChannelScores:
    """`low_frequency_sensitivity` from what enters the block: a search keeps it, since the blocks below are final.

    Args:
        slim: in evaluation mode.
        streams: tokens [B, P + N, C] of the images and of the low-passed images, and labels [B], on the model's device.
        block: index of the block to score.
        weight: share of the cross-entropy, in [0, 1].
        add_up: adds up what several processes found.

    Raises:
        ValueError: there are no batches.
    """
    layers = _layers(slim, block)
    # FP64: it makes no difference then in which order gradients are summed.
    total = [torch.zeros_like(layer.weight, dtype=torch.float64) for layer in layers]
    count = 0
    for clean, low, labels in streams:
        loss = _loss(slim, clean, low, labels, block, weight)
        for sum_, gradient in zip(total, torch.autograd.grad(loss, [layer.weight for layer in layers]), strict=True):
            sum_ += gradient
        count += 1
    sums = add_up([*total, torch.tensor(count, dtype=torch.float64)])
    if sums is None or not sums[-1]:
        raise ValueError("channel sensitivity needs at least one batch")
    *total, batches = sums
    products = (gradient / batches * layer.weight.detach() for gradient, layer in zip(total, layers, strict=True))
    return channel_scores(products, slim.blocks[block].attn.num_heads, slim.architecture.dense.qk_step)


def taylor(slim: SlimViT, streams: Iterable[ScoringBatch], block: int, add_up: AddUp = alone) -> ChannelScores:
    """First-order Taylor saliency as in NViT (Yang et al., 2023): LFS's sum with the gradient of the cross-entropy on
    unfiltered images. See `sensitivity_from`."""
    unfiltered = ((clean, clean, labels) for clean, _, labels in streams)
    return sensitivity_from(slim, unfiltered, block, 1.0, add_up)


def magnitude(slim: SlimViT, block: int) -> ChannelScores:
    """The squared L2 norm of each weight row."""
    weights = (layer.weight.detach() for layer in _layers(slim, block))
    return channel_scores(weights, slim.blocks[block].attn.num_heads, slim.architecture.dense.qk_step)


def random_scores(slim: SlimViT, block: int, seed: int) -> ChannelScores:
    """Uniform noise: the floor for any criterion."""
    check_scored(slim, block)
    generator = torch.Generator().manual_seed(seed * len(slim.blocks) + block)
    attention, dense = slim.blocks[block].attn, slim.architecture.dense
    heads, step = attention.num_heads, dense.qk_step
    sizes = ((heads, attention.qk_dim // step), (heads, attention.v_dim), (slim.blocks[block].shape.hidden,))
    pairs, values, hidden = (torch.rand(size, generator=generator) for size in sizes)
    return ChannelScores(pairs, values, hidden, step=step, gated=dense.gated)


CHANNEL_CRITERIA: dict[
    ChannelCriterion, Callable[[SlimViT, Iterable[ScoringBatch], int, CriterionContext], ChannelScores]
] = {
    "lfs": lambda slim, streams, block, context: sensitivity_from(slim, streams, block, context.weight, context.add_up),
    "obs": lambda slim, streams, block, context: obs(
        slim, (clean for clean, _, _ in streams), block, context.metric, context.starts, context.add_up
    ),
    "taylor": lambda slim, streams, block, context: taylor(slim, streams, block, context.add_up),
    "magnitude": lambda slim, _streams, block, _context: magnitude(slim, block),
    "random": lambda slim, _streams, block, context: random_scores(slim, block, context.seed),
}


def _layers(slim: SlimViT, block: int) -> list[nn.Linear]:
    check_scored(slim, block)
    attention = slim.blocks[block].attn
    return [attention.query, attention.key, attention.value, *slim.blocks[block].mlp.first.values()]


def _loss(slim: SlimViT, clean: Tensor, low: Tensor, labels: Tensor, block: int, weight: float) -> Tensor:
    """Eq. 3-4 for one batch; only what lies above the scored block is differentiated."""
    with torch.no_grad():
        clean_token = slim.summary(slim.blocks[block](clean))
    low = slim.blocks[block](low)
    low_token = slim.summary(low)
    for later in slim.blocks[block + 1 :]:
        low = later(low)
    return sensitivity_loss(slim.classify(low), labels, clean_token, low_token, weight)


def _below(slim: SlimViT, images: Tensor, block: int) -> Tensor:
    """Tokens that enter `block`."""
    tokens = slim.embed(images)
    for earlier in slim.blocks[:block]:
        tokens = earlier(tokens)
    return tokens
