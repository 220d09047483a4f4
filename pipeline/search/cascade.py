"""The bottom-up cascade: block by block, first tokens, then channels, until the allowed accuracy is spent.

Each block may cost `allowable_drop / L` points of top-1 against the model as it entered the block; tokens may spend
the share `token_share` of it, channels all of it (`--allowable-drop`, as in the paper). Refitting what reads the
removed channels is part of a trial, so that more can go for the same drop. `target.py` is the other way to say
how far: a MACs or latency target.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.channels import ChannelChoice, choose_shaped
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim import SlimBlock, SlimViT
from lowpass.pipeline.search.decisions import ChannelDecision, Curve, Decision, Plan, TokenDecision, Trial
from lowpass.pipeline.search.shaping import Prune, Shaping
from lowpass.pipeline.search.state import Standing

FIRST_BLOCK_KEEP = 0.97  # the paper: block 0 keeps at least this share of its tokens
D = TypeVar("D", TokenDecision, ChannelDecision, Curve, Plan)
RESOLUTION = 0.03  # an amount is found to this share of what the block has


class Log:
    """Decisions of an interrupted search first, then new ones, each recorded before it is acted on."""

    def __init__(self, decided: list[Decision], record: Callable[[Decision], None]) -> None:
        self._replay, self._record = iter(decided), record
        self.fresh = not decided

    def next(self, kind: type[D], decide: Callable[..., D], *arguments: Any) -> D:
        """The next decision: replayed, or `decide(*arguments)`.

        Raises:
            InputError: the interrupted search went another way.
        """
        decision = next(self._replay, None)
        if decision is None:
            made = decide(*arguments)
            self._record(made)
            return made
        if not isinstance(decision, kind):
            raise InputError(f"the search log holds a {decision.kind} decision out of order; give another --out")
        return decision


def search_to_drop(standing: Standing, allowance: float, log: Log) -> None:
    """Prune in place, allowing `allowance` points of top-1 in all."""
    model, recipe = standing.model, standing.recipe
    shaping, depth = recipe.shaping, len(model.blocks)
    stages = shaping.stages(depth) if recipe.prune != "channels" else ()
    token_share = {"both": recipe.token_share, "tokens": 1.0, "channels": 0.0}[recipe.prune]
    top1 = standing.top1(model.blocks)
    guesses = {"tokens": 0.1, "channels": 0.3}  # shares; once a block is done, what it came to
    for index in range(depth):
        floor = top1
        if index in stages:
            floor -= allowance * token_share / len(stages)
            tokens = log.next(TokenDecision, _drop_tokens, standing, floor, top1, guesses)
            guesses["tokens"] = 1 - tokens.keep / model.blocks[index].tokens_in
            model.set_keep(index, tokens.keep)
            top1 = tokens.top1
        if recipe.prune != "tokens":
            floor -= allowance * (1 - token_share) / depth
            channels = log.next(ChannelDecision, _drop_channels, standing, floor, top1, guesses)
            guesses["channels"] = channels.dropped / _rows(model.blocks[index])
            apply(standing, channels)
            top1 = channels.top1
        standing.ascend()


def apply(standing: Standing, decision: ChannelDecision) -> None:
    """Cut the block at hand as decided."""
    if decision.choice is not None:
        block, _ = standing.cut(decision.choice)
        standing.model.vit.blocks[standing.index] = block


def first_keep(architecture: Architecture) -> int:
    """What block 0 must pass on."""
    return max(1, round(FIRST_BLOCK_KEEP * architecture.dense.num_tokens))


def _drop_tokens(standing: Standing, floor: float, before: float, guesses: dict[str, float]) -> TokenDecision:
    """The fewest tokens that leave top-1 at or above `floor`; the count holds for all later blocks."""
    model, index, shaping = standing.model, standing.index, standing.recipe.shaping
    architecture = model.architecture
    have = architecture.blocks[index].keep
    fewest = min(have, first_keep(architecture)) if index == 0 else 1

    def left(dropped: int) -> int:
        return shaping.keep(have - dropped, have, architecture.dense.num_prefix_tokens)

    def top1(dropped: int) -> float:
        with keeping(model, index, left(dropped)):
            return standing.top1(model.blocks[index:], floor)

    dropped, trials = largest(have - fewest, have, guesses["tokens"], floor, top1)
    if architecture.with_keep(index, left(dropped)).macs() > architecture.macs():
        dropped = 0  # the token filter would cost more than so few tokens save
    keep = left(dropped)
    return TokenDecision(
        block=index,
        keep=keep,
        top1=trials[dropped] if dropped else before,
        macs=architecture.with_keep(index, keep).macs(),
        trials=tuple(Trial(amount=left(amount), top1=top1) for amount, top1 in trials.items()),
    )


def _drop_channels(standing: Standing, floor: float, before: float, guesses: dict[str, float]) -> ChannelDecision:
    """The most channels, lowest LFS first, that leave top-1 at or above `floor`."""
    model, index = standing.model, standing.index
    scores = standing.sensitivity()
    have = _rows(model.blocks[index])

    def choice(n: int) -> ChannelChoice:
        return choose_shaped(scores, n, standing.recipe.shaping)

    cuts = {}

    def top1(n: int) -> float:
        block, refits = standing.cut(choice(n))
        cuts[n] = refits
        return standing.top1([block, *model.blocks[index + 1 :]], floor)

    n, trials = largest(have - 1, have, guesses["channels"], floor, top1)
    architecture = model.architecture
    if n:
        architecture = architecture.with_block(index, choice(n).shape(architecture.blocks[index].keep))
    return ChannelDecision(
        block=index,
        dropped=n,
        choice=choice(n) if n else None,
        top1=trials[n] if n else before,
        macs=architecture.macs(),
        refits=cuts[n] if n else (),
        trials=tuple(Trial(amount=amount, top1=left) for amount, left in trials.items()),
    )


def _rows(block: SlimBlock) -> int:
    """Channels of a block, a query/key pair counted twice."""
    shape = block.shape
    return shape.heads * (2 * shape.qk_dim + shape.v_dim) + shape.hidden


@contextmanager
def keeping(model: SlimViT, index: int, keep: int) -> Iterator[None]:
    """`model` with fewer tokens for a while."""
    before = [block.keep for block in model.blocks]
    model.set_keep(index, keep)
    try:
        yield
    finally:
        for later in range(index, len(before)):
            model.set_keep(later, before[later])


def largest(
    limit: int, have: int, guess: float, floor: float, top1: Callable[[int], float]
) -> tuple[int, dict[int, float]]:
    """About the largest amount up to `limit` that leaves top-1 at or above `floor`, and every trial made.

    From a guess (a share of `have`, such as what the block below came to) in doubling steps until one amount is
    accepted and one refused, then halving, to within `RESOLUTION` of `have`: blocks are alike, so that it takes few.
    """
    resolution = max(1, round(RESOLUTION * have))
    accepted, refused, trials = 0, limit + 1, dict[int, float]()
    amount, step = min(limit, max(1, round(guess * have))), resolution
    while refused - accepted > resolution or (refused > limit > accepted):
        trials[amount] = top1(amount)
        if trials[amount] >= floor:
            accepted = amount
        else:
            refused = amount
        if refused > limit:  # nothing refused so far
            amount, step = min(limit, accepted + step), 2 * step
        elif not accepted:
            amount, step = max(1, refused - step), 2 * step
        else:
            amount = (accepted + refused) // 2
        if accepted == 0 and refused == 1:
            break
    return accepted, trials


def smallest_share(architecture: Architecture, shaping: Shaping, prune: Prune) -> float:
    """The share of the MACs that is left when every block is as small as it can be."""
    blocks = shaping.smallest(architecture.dense, first_keep(architecture), prune)
    return architecture.model_copy(update={"blocks": blocks}).macs() / architecture.macs()


def check_target(architecture: Architecture, target_macs: float, shaping: Shaping, prune: Prune = "both") -> None:
    """Refuse a target below what is left when every block is as small as it can be.

    Raises:
        InputError: with the lowest share of the MACs that can be reached.
    """
    lowest = smallest_share(architecture, shaping, prune)
    if target_macs < lowest:
        share = math.ceil(lowest * 1000) / 1000
        raise InputError(
            f"a MACs target of {target_macs:g} is out of reach for {architecture.dense.name}: "
            f"at least {share:.3f} of the dense MACs remain; the paper's targets are 0.45 to 0.6"
        )
