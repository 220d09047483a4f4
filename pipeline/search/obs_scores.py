"""Structured OBS (`method/structured_obs.py`) run on a block: the scores of its channels and heads."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.recovery import AddUp, Readout, alone, token_weights
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.method.structured_obs import BlockMetric, logit_gram, removal_costs
from lowpass.pipeline.model.slim_block import SlimBlock, layer_scale
from lowpass.pipeline.model.slim_vit import SlimViT

OBSERVED_TOKENS = 65_536  # some fifty for each channel


def check_scored(slim: SlimViT, block: int) -> None:
    """Refuse to score a block of which a part is gone.

    Raises:
        InputError: it lacks its attention or its MLP.
    """
    part = slim.blocks[block]
    if not (part.has_attention and part.has_mlp):
        missing = "MLP" if part.has_attention else "attention"
        raise InputError(f"block {block} has no {missing}; only channels of a whole block can be scored")


def obs(
    slim: SlimViT,
    entering: Iterable[Tensor],
    block: int,
    metric: BlockMetric | None,
    starts: Sequence[int] | None = None,
    add_up: AddUp = alone,
) -> ChannelScores:
    """Value and hidden channels and heads by what the projection and the second MLP layer lose that a refit does not
    give back, query-key pairs by the logits.

    Scores of a kind are divided by their mean: a logit and a token have no unit in common.

    Args:
        slim: in evaluation mode.
        entering: tokens [B, P + N, C] that enter the block, on the model's device.
        block: its index.
        metric: in which errors are measured; None: all channels of the stream count the same.
        starts: how many images there are before each batch; None: those of the batches before it.
        add_up: adds up what several processes found.

    Raises:
        ValueError: there are no batches.
        InputError: the block lacks its attention or its MLP.
    """
    check_scored(slim, block)
    part, dense = slim.blocks[block], slim.architecture.dense
    attention, reader = part.attn, part.mlp.fc2
    last = block == len(slim.blocks) - 1
    sums = list[Tensor]()
    seen = 0
    with torch.no_grad():
        for number, clean in enumerate(entering):
            if (seen if starts is None else starts[number]) * clean.shape[1] >= OBSERVED_TOKENS:
                break
            seen += len(clean)
            found = _moments(part, clean, dense.readout, last)
            sums = [one + two for one, two in zip(sums, found, strict=True)] if sums else list(found)
    found_by_all = add_up(sums or None)
    if found_by_all is None:
        raise ValueError("channel sensitivity needs at least one batch")
    logits, mixed, hidden = found_by_all
    heads, size = attention.num_heads, attention.v_dim
    value_weight, hidden_weight = _with_bias(attention.proj, part.ls1), _with_bias(reader, part.ls2)
    if metric is not None:
        value_weight, hidden_weight = metric.middle @ value_weight.double(), metric.leaving @ hidden_weight.double()
    ones, step = torch.ones(1, logits.shape[-1], device=logits.device), dense.qk_step
    pairs = torch.stack([removal_costs(gram, ones, group=step) for gram in logits])
    values = removal_costs(mixed, value_weight, always=1).unflatten(0, (heads, size))
    whole = removal_costs(mixed, value_weight, group=size, always=1)
    scores = (pairs, values, removal_costs(hidden, hidden_weight, always=1), whole)
    pairs, values, hidden, whole = ((score / score.mean().clamp_min(1e-300)).float().cpu() for score in scores)
    return ChannelScores(pairs, values, hidden, whole, cumulative=True, step=step, gated=dense.gated)


def _moments(block: SlimBlock, tokens: Tensor, readout: Readout, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of a batch, FP64: of the logits of each head [H, Dqk, Dqk], and of what the projection [H * Dv + 1, ...] and the
    second MLP layer read [M + 1, ...], a constant 1 at the end. Channels that rotary positions turn into each other lie
    side by side."""
    query, key = block.attn.query_key(block.normed(tokens), *block.stream.places(tokens))
    if block.attn.rotary:
        query, key = (side.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) for side in (query, key))
    mixed, attention = block.features(tokens)
    middle = block.select(block.stream.add(tokens, block.ls1(block.attn.proj(mixed))), attention)
    hidden = block.mlp.features(block.hidden_input(middle))

    def weights(like: Tensor) -> Tensor:
        return token_weights(like.shape[1], block.num_prefix_tokens, readout, last, like)

    def second(features: Tensor) -> Tensor:
        rows = torch.cat([features, features.new_ones(*features.shape[:2], 1)], 2)
        return ((rows * weights(features)[:, None]).flatten(0, 1).T @ rows.flatten(0, 1)).double()

    return logit_gram(query, key, weights(tokens)).double(), second(mixed), second(hidden)


def _with_bias(layer: nn.Linear, scale: nn.Module) -> Tensor:
    """[C, k + 1]: what the layer adds to the stream, its bias last."""
    weight = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)
    gamma = layer_scale(scale)
    return weight if gamma is None else weight * gamma[:, None]
