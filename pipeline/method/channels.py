"""Which channels of a block stay: by a score threshold with head search (the paper's way), or to a given shape."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.method.rotary import whole_pairs
from lowpass.pipeline.method.sensitivity import ChannelScores

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class ChannelChoice:
    """What stays of a block. Indices are ascending and refer to the block as it was scored.

    `heads[i]` is a kept head; `query_key[i]` and `value[i]` are the channels kept inside it (equally many in every
    head). `hidden` are the kept hidden channels of the MLP.
    """

    heads: tuple[int, ...]
    query_key: tuple[tuple[int, ...], ...]
    value: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]

    def shape(self, keep: int) -> BlockShape:
        """The block that results, passing on `keep` tokens."""
        return BlockShape(
            heads=len(self.heads),
            qk_dim=len(self.query_key[0]) if self.heads else 0,
            v_dim=len(self.value[0]) if self.heads else 0,
            hidden=len(self.hidden),
            keep=keep,
        )


def choose_channels(scores: ChannelScores, n: int) -> ChannelChoice:
    """Drop about `n` channels of a block; a query/key pair counts twice.

    The n smallest scores over query, key, value and hidden rows lie below the threshold. Hidden channels at or above it
    stay. For attention, with `Sq = Sk` and `Sv` rows at or above it, every head count h that can hold them is tried at
    `round((Sq + Sk) / h / 2)` query/key and `round(Sv / h)` value channels a head (at least one each); the h best heads
    with their best channels are taken, and the h that loses least score wins, the lower one at a tie. Where positions
    are rotary, query and key channels go by twos, which count for four rows; a hidden channel of a gated MLP counts for
    two.

    Raises:
        ValueError: `n` is negative or leaves nothing.

    Example:
        >>> scores = ChannelScores(torch.tensor([[4.0, 3.0], [0.1, 0.2]]), torch.ones(2, 2), torch.tensor([5.0, 0.0]))
        >>> choose_channels(scores, 1).hidden  # the lowest score of all
        (0,)
    """
    pairs, values, hidden = scores.query_key, scores.value, scores.hidden
    threshold = score_threshold(scores, n)
    stays = (hidden >= threshold).nonzero().flatten()
    if len(hidden) and not len(stays):
        stays = hidden.argmax(keepdim=True)
    num_pairs, num_values = int((pairs >= threshold).sum()), int((values >= threshold).sum())
    fewest = max(math.ceil(num_pairs / pairs.shape[1]), math.ceil(num_values / values.shape[1]), 1)
    best: ChannelChoice | None = None
    best_worth = -math.inf
    for heads in range(fewest, len(pairs) + 1):
        qk_dim, v_dim = scores.step * max(round(num_pairs / heads), 1), max(round(num_values / heads), 1)
        choice, worth = best_heads(scores, heads, qk_dim, v_dim, tuple(stays.tolist()))
        if worth > best_worth:  # what the threshold would keep is the same for every h: most worth loses least
            best, best_worth = choice, worth
    assert best is not None
    return best


def choose_for_shape(scores: ChannelScores, shape: BlockShape) -> ChannelChoice:
    """The best-scored channels that give a block of the shape asked for; none of a part that is to go whole.

    Raises:
        ValueError: the block is smaller than `shape` in some dimension, or positions are rotary and `qk_dim` is odd.
    """
    have = (len(scores.query_key), scores.qk_dim, scores.value.shape[1], len(scores.hidden))
    want = (shape.heads, shape.qk_dim, shape.v_dim, shape.hidden)
    if any(w > h for w, h in zip(want, have, strict=True)):
        raise ValueError(f"heads, qk_dim, v_dim, hidden = {want} cannot be cut out of {have}")
    if shape.qk_dim % scores.step:
        raise ValueError(f"rotary positions turn query and key channels by pairs: {shape.qk_dim} cannot stay")
    hidden = best_channels(scores.hidden, shape.hidden)
    if not shape.heads:
        return ChannelChoice((), (), (), hidden)
    return best_heads(scores, shape.heads, shape.qk_dim, shape.v_dim, hidden)[0]


def score_threshold(scores: ChannelScores, n: int) -> Tensor:
    """The score below which `n` rows lie, one that several share counted for each of them."""
    pairs, hidden = 2 * scores.step * [scores.query_key.flatten()], scores.hidden_rows * [scores.hidden]
    everything = torch.cat([*pairs, scores.value.flatten(), *hidden]).sort().values
    if not 0 <= n < len(everything):
        raise ValueError(f"cannot drop {n} of {len(everything)} channels")
    return everything[n]


def best_heads(
    scores: ChannelScores, heads: int, qk_dim: int, v_dim: int, hidden: tuple[int, ...]
) -> tuple[ChannelChoice, float]:
    """The `heads` heads worth most at the given sizes, and their worth (a pair scores for its query and its key). Where
    the scores say what whole heads are worth, a thin one is worth its channels' share of that."""
    pairs, values = scores.query_key.double(), scores.value.double()
    rows, most = 2 * scores.step, qk_dim // scores.step
    worth = rows * pairs.topk(most).values.sum(1) + values.topk(v_dim).values.sum(1)
    if scores.heads is not None:
        worth = scores.heads.double() * worth / (rows * pairs.sum(1) + values.sum(1)).clamp_min(TINY)
    kept = best_channels(worth, heads)
    query_key = tuple(best_channels(pairs[h], most) for h in kept)
    if scores.step > 1:
        query_key = tuple(whole_pairs(chosen, scores.qk_dim) for chosen in query_key)
    choice = ChannelChoice(
        heads=kept,
        query_key=query_key,
        value=tuple(best_channels(values[h], v_dim) for h in kept),
        hidden=hidden,
    )
    return choice, float(worth[list(kept)].sum())


def best_channels(scores: Tensor, k: int) -> tuple[int, ...]:
    """Indices of the k largest, ascending; the lower index at a tie."""
    order = scores.argsort(descending=True, stable=True)[:k]
    return tuple(order.sort().values.tolist())
