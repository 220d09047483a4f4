"""The bottom-up cascade: block by block, first tokens, then channels, until the allowed accuracy is spent.

Each block may cost `allowable_drop / L` points of top-1 against the model as it entered the block; tokens may spend
the share `token_share` of it, channels all of it (`--allowable-drop`, as in the paper). Refitting what reads the
removed channels is part of a trial, so that more can go for the same drop. `target.py` is the other way to say
how far: a MACs or latency target.
"""

import math
from collections.abc import Callable

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.log_entries import ChannelDecision, ClassifierDecision, TokenDecision, Trial
from lowpass.pipeline.search.shaping import Prune, Shaping, choose_shaped, first_keep
from lowpass.pipeline.search.state import SearchState, keeping

RESOLUTION = 0.03  # an amount is found to this share of what the block has


def search_to_drop(state: SearchState, allowance: float, log: SearchLog) -> None:
    """Prune in place, allowing `allowance` points of top-1 in all."""
    model, settings = state.model, state.settings
    shaping, depth = settings.shaping, len(model.blocks)
    stages = shaping.stages(depth) if settings.prune != "channels" else ()
    token_share = {"both": settings.token_share, "tokens": 1.0, "channels": 0.0}[settings.prune]
    top1 = state.top1(model.blocks)
    guesses = {"tokens": 0.1, "channels": 0.3}  # shares; once a block is done, what it came to
    for index in range(depth):
        floor = top1
        top1 = state.adapt_unless_worse(top1)
        if index in stages:
            floor -= allowance * token_share / len(stages)
            tokens = log.next(TokenDecision, _drop_tokens, state, floor, top1, guesses)
            guesses["tokens"] = 1 - tokens.keep / model.blocks[index].tokens_in
            model.set_keep(index, tokens.keep)
            top1 = tokens.top1
        if settings.prune != "tokens":
            floor -= allowance * (1 - token_share) / depth
            channels = log.next(ChannelDecision, _drop_channels, state, floor, top1, guesses)
            guesses["channels"] = channels.dropped / _rows(model.blocks[index])
        else:
            channels = log.next(ChannelDecision, _uncut, state, top1)
        apply(state, channels)
        top1 = channels.top1
        state.ascend()
    refit_classifier(state, log)


def refit_classifier(state: SearchState, log: SearchLog) -> None:
    """The last step of a search with recovery."""
    if refits := state.refit_classifier():
        log.next(ClassifierDecision, lambda: ClassifierDecision(refits=refits, top1=state.top1([])))


def apply(state: SearchState, decision: ChannelDecision) -> None:
    """Cut the block at hand as decided."""
    if decision.choice is not None or decision.refits:
        block, _ = state.cut(decision.choice)
        state.model.vit.blocks[state.index] = block


def _drop_tokens(state: SearchState, floor: float, before: float, guesses: dict[str, float]) -> TokenDecision:
    """The fewest tokens that leave top-1 at or above `floor`; the count holds for all later blocks."""
    model, index, shaping = state.model, state.index, state.settings.shaping
    architecture = model.architecture
    have = architecture.blocks[index].keep
    fewest = min(have, first_keep(architecture)) if index == 0 else 1

    def left(dropped: int) -> int:
        return shaping.keep(have - dropped, have, architecture.dense.num_prefix_tokens)

    def top1(dropped: int) -> float:
        with keeping(model, index, left(dropped)):
            return state.top1(model.blocks[index:], floor)

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


def _drop_channels(state: SearchState, floor: float, before: float, guesses: dict[str, float]) -> ChannelDecision:
    """The most channels, lowest scores first, that leave top-1 at or above `floor`."""
    model, index = state.model, state.index
    scores = state.sensitivity()
    have = _rows(model.blocks[index])

    def choice(n: int) -> ChannelChoice:
        return choose_shaped(scores, n, state.settings.shaping)

    cuts = {}

    def top1(n: int) -> float:
        block, refits = state.cut(choice(n))
        cuts[n] = refits
        return state.top1([block, *model.blocks[index + 1 :]], floor)

    n, trials = largest(have - 1, have, guesses["channels"], floor, top1)
    tried = tuple(Trial(amount=amount, top1=left) for amount, left in trials.items())
    if not n:
        return _uncut(state, before).model_copy(update={"trials": tried})
    macs = model.architecture.with_block(index, choice(n).shape(model.blocks[index].keep)).macs()
    return ChannelDecision(
        block=index, dropped=n, choice=choice(n), top1=trials[n], macs=macs, refits=cuts[n], trials=tried
    )


def _uncut(state: SearchState, before: float) -> ChannelDecision:
    """No channel goes. What reads a stream that has changed is refitted, unless that lowers top-1."""
    model, index = state.model, state.index
    block, refits = state.cut(None)
    top1 = state.top1([block, *model.blocks[index + 1 :]]) if refits else before
    if top1 < before:
        top1, refits = before, ()
    return ChannelDecision(block=index, choice=None, top1=top1, macs=model.architecture.macs(), refits=refits)


def _rows(block: SlimBlock) -> int:
    """Channels of a block, a query/key pair counted twice."""
    shape = block.shape
    return shape.heads * (2 * shape.qk_dim + shape.v_dim) + shape.hidden


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
