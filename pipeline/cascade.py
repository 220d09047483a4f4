"""The bottom-up cascade: block by block, first tokens, then channels, until the allowed accuracy is spent.

Each block of a pass may cost `allowance / L` points of top-1 against the model as it entered the block; tokens may
spend the share `token_share` of it, channels all of it. `--allowable-drop` is one such pass, as in the paper.
`--target-macs` adds a line that falls evenly from the MACs at hand to the target: no step goes below it, so that no
block is emptied while those above stay whole; a block that accuracy stops short leaves the rest to the blocks above,
and what is left at the top to another pass, allowed twice the last, over the model as it then stands.
"""

import copy
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pipeline.architecture import Architecture
from pipeline.channels import ChannelChoice, choose_for_shape, choose_shaped
from pipeline.data import Batches
from pipeline.errors import InputError
from pipeline.recipe import Recipe
from pipeline.removal import remove_channels
from pipeline.sensitivity import ChannelScores, low_frequency_sensitivity
from pipeline.shaping import Shaping
from pipeline.slim import SlimBlock, SlimViT

FIRST_BLOCK_KEEP = 0.97  # the paper: block 0 keeps at least this share of its tokens
FIRST_PASS = 2.0  # points of top-1 that the first pass towards a MACs target may cost
RESOLUTION = 0.03  # an amount is found to this share of what the block has


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Trial(_Record):
    """One amount that was tried: tokens kept, or channels dropped, and the top-1 (percent) that was left."""

    amount: int
    top1: float


class TokenDecision(_Record):
    """How many image tokens a block passes on."""

    kind: Literal["tokens"] = "tokens"
    round: int
    block: int
    keep: int
    top1: float
    macs: int
    trials: tuple[Trial, ...] = ()

    def apply(self, model: SlimViT) -> None:
        """Do to `model` what was decided."""
        model.set_keep(self.block, self.keep)


class ChannelDecision(_Record):
    """Which channels of a block stay; None: all of them."""

    kind: Literal["channels"] = "channels"
    round: int
    block: int
    choice: ChannelChoice | None
    top1: float
    macs: int
    trials: tuple[Trial, ...] = ()

    def apply(self, model: SlimViT) -> None:
        """Do to `model` what was decided."""
        if self.choice is not None:
            remove_channels(model.blocks[self.block], self.choice)


Decision = Annotated[TokenDecision | ChannelDecision, Field(discriminator="kind")]


@dataclass
class _Standing:
    """The model as it stands, and what enters the block under search: blocks below it are final."""

    model: SlimViT
    tokens: list[Tensor]
    labels: list[Tensor]
    top1: float

    @torch.inference_mode()
    def measure(self, blocks: list[SlimBlock]) -> float:
        """Top-1 (percent) with `blocks` from here to the top."""
        correct = 0
        for tokens, labels in zip(self.tokens, self.labels, strict=True):
            for block in blocks:
                tokens = block(tokens)
            correct += int((self.model.classify(tokens).argmax(-1) == labels).sum())
        return 100 * correct / sum(map(len, self.labels))

    @torch.inference_mode()
    def ascend(self, block: SlimBlock) -> None:
        """Move past a block that is final."""
        self.tokens = [block(tokens) for tokens in self.tokens]


def search(
    model: SlimViT,
    scoring: Batches,
    measuring: Batches,
    recipe: Recipe,
    decided: list[Decision],
    record: Callable[[Decision], None],
) -> None:
    """Prune `model` in place.

    Args:
        model: the dense model as a SlimViT, in evaluation mode.
        scoring: batches for LFS.
        measuring: batches for top-1.
        recipe: the goal (`target_macs` or `allowable_drop`) and the criteria's settings.
        decided: decisions of an interrupted run, replayed first.
        record: called with each new decision before it is acted on.
    """
    dense_macs = model.architecture.macs()
    target = round(recipe.target_macs * dense_macs) if recipe.target_macs else 0
    allowance, round_ = recipe.allowable_drop or FIRST_PASS, 0
    replay = iter(decided)
    while True:
        before = model.architecture.macs()
        _one_pass(model, scoring, measuring, recipe, allowance, target, round_, replay, record)
        after = model.architecture.macs()
        if recipe.allowable_drop is not None or after <= target:
            return
        if after == before and allowance > 100 * len(model.blocks):
            raise InputError(
                f"no pruning reaches the target; the search stopped at {after / dense_macs:.3f} of the MACs"
            )
        allowance, round_ = 2 * allowance, round_ + 1


def check_target(architecture: Architecture, target_macs: float, shaping: Shaping) -> None:
    """Refuse a target below what is left when every block is as small as it can be.

    Raises:
        InputError: with the lowest share of the MACs that can be reached.
    """
    blocks = shaping.smallest(architecture.dense, _first_keep(architecture))
    lowest = architecture.model_copy(update={"blocks": blocks}).macs() / architecture.macs()
    if target_macs < lowest:
        raise InputError(
            f"a MACs target of {target_macs:g} is out of reach for {architecture.dense.name}: "
            f"at least {lowest:.3f} of the dense MACs remain; the paper's targets are 0.45 to 0.6"
        )


def _one_pass(
    model: SlimViT,
    scoring: Batches,
    measuring: Batches,
    recipe: Recipe,
    allowance: float,
    target: int,
    round_: int,
    replay: Iterator[Decision],
    record: Callable[[Decision], None],
) -> None:
    """Every block once, from the bottom. `target` 0: no line, accuracy alone decides."""
    start = model.architecture.macs() if target else 0
    device = next(model.parameters()).device
    with torch.inference_mode():
        tokens = [model.embed(images.to(device)) for images, _ in measuring]
    standing = _Standing(model, tokens, [labels.to(device) for _, labels in measuring], 0.0)
    standing.top1 = standing.measure(model.blocks)
    shaping, depth = recipe.shaping, len(model.blocks)
    stages = shaping.stages(depth)
    # Of what a pass may cost, in accuracy and along the line: the share of one block's channels, of one token drop.
    parts = {"tokens": recipe.token_share / len(stages), "channels": (1 - recipe.token_share) / depth}
    progress = 0.0
    for index in range(depth):
        floor = standing.top1
        for kind in ("tokens", "channels") if index in stages else ("channels",):
            progress += parts[kind]
            floor -= allowance * parts[kind]
            limit = round(start - (start - target) * progress)
            if model.architecture.macs() <= limit:
                continue
            decision = next(replay, None)
            if decision is None:
                if kind == "tokens":
                    decision = _drop_tokens(standing, index, floor, limit, round_, shaping)
                else:
                    scores = low_frequency_sensitivity(model, scoring, index, recipe.image_cutoff, recipe.lfs_weight)
                    decision = _drop_channels(standing, scores, index, floor, limit, round_, shaping)
                record(decision)
            decision.apply(model)
            standing.top1 = decision.top1
        standing.ascend(model.blocks[index])


def _first_keep(architecture: Architecture) -> int:
    """What block 0 must pass on."""
    return max(1, round(FIRST_BLOCK_KEEP * architecture.dense.num_tokens))


def _drop_tokens(
    standing: _Standing, index: int, floor: float, macs_limit: int, round_: int, shaping: Shaping
) -> TokenDecision:
    """The fewest tokens that leave top-1 at or above `floor`; the count holds for all later blocks."""
    model, architecture = standing.model, standing.model.architecture
    have = architecture.blocks[index].keep
    fewest = min(have, _first_keep(architecture)) if index == 0 else 1

    def left(dropped: int) -> int:
        return shaping.keep(have - dropped, have, architecture.dense.num_prefix_tokens)

    def top1(dropped: int) -> float:
        with _keeping(model, index, left(dropped)):
            return standing.measure(model.blocks[index:])

    most = _least(have - fewest, lambda dropped: architecture.with_keep(index, left(dropped)).macs() <= macs_limit)
    dropped, trials = _most(most, have, floor, top1)
    if architecture.with_keep(index, left(dropped)).macs() > architecture.macs():
        dropped = 0  # the token filter would cost more than so few tokens save
    keep = left(dropped)
    return TokenDecision(
        round=round_,
        block=index,
        keep=keep,
        top1=trials.get(dropped, standing.top1),
        macs=architecture.with_keep(index, keep).macs(),
        trials=tuple(Trial(amount=left(amount), top1=top1) for amount, top1 in trials.items()),
    )


def _drop_channels(
    standing: _Standing,
    scores: ChannelScores,
    index: int,
    floor: float,
    macs_limit: int,
    round_: int,
    shaping: Shaping,
) -> ChannelDecision:
    """The most channels, lowest LFS first, that leave top-1 at or above `floor`."""
    model, architecture = standing.model, standing.model.architecture
    have = 2 * scores.query_key.numel() + scores.value.numel() + len(scores.hidden)

    def choice(n: int) -> ChannelChoice:
        chosen = choose_shaped(scores, n, shaping)
        if not shaping.whole_heads:
            return chosen
        # A head is a large step: where it overshoots the line, hidden channels come back.
        shape = chosen.shape(architecture.blocks[index].keep)
        for width in range(len(scores.hidden), shape.hidden, -1):
            if shaping.width(width, len(scores.hidden)) == width:
                wider = shape.model_copy(update={"hidden": width})
                if architecture.with_block(index, wider).macs() <= macs_limit:
                    return choose_for_shape(scores, wider)
        return chosen

    def top1(n: int) -> float:
        candidate = copy.deepcopy(model.blocks[index])
        remove_channels(candidate, choice(n))
        return standing.measure([candidate, *model.blocks[index + 1 :]])

    def macs(n: int) -> int:
        if not n:
            return architecture.macs()
        return architecture.with_block(index, choice(n).shape(architecture.blocks[index].keep)).macs()

    most = _least(have - 1, lambda n: macs(n) <= macs_limit)
    n, trials = _most(most, have, floor, top1)
    return ChannelDecision(
        round=round_,
        block=index,
        choice=choice(n) if n else None,
        top1=trials.get(n, standing.top1),
        macs=macs(n),
        trials=tuple(Trial(amount=amount, top1=left) for amount, left in trials.items()),
    )


@contextmanager
def _keeping(model: SlimViT, index: int, keep: int) -> Iterator[None]:
    """`model` with fewer tokens for a while."""
    before = [block.keep for block in model.blocks]
    model.set_keep(index, keep)
    try:
        yield
    finally:
        for later in range(index, len(before)):
            model.set_keep(later, before[later])


def _least(limit: int, reached: Callable[[int], bool]) -> int:
    """The least amount up to `limit` that reaches, or `limit`; reaching grows with the amount."""
    return min(bisect_left(range(limit + 1), True, key=reached), limit)


def _most(limit: int, have: int, floor: float, top1: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """About the largest amount up to `limit` that leaves top-1 at or above `floor`, and every trial made.

    Bisection to within `RESOLUTION` of `have`; `limit` itself is tried when nothing below it was refused.
    """
    accepted, refused, trials = 0, limit + 1, dict[int, float]()
    while refused - accepted > max(1, round(RESOLUTION * have)):
        middle = (accepted + refused) // 2
        trials[middle] = top1(middle)
        if trials[middle] >= floor:
            accepted = middle
        else:
            refused = middle
    if refused > limit > accepted:
        trials[limit] = top1(limit)
        accepted = limit if trials[limit] >= floor else accepted
    return accepted, trials
