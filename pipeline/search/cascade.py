"""The bottom-up cascade: block by block, first tokens, then channels, until the allowed accuracy is spent.

Of `allowable_drop` points of top-1, the share `token_share` is for tokens, split evenly over the blocks that may drop
some, and the rest is for channels, split evenly over all L blocks. Where every block may drop tokens, as in the paper,
each has `allowable_drop / L`, measured against the model as it entered the block; what tokens leave of theirs, channels
may spend. Where whole parts of a block may go, that is tried before single channels. Refitting what reads the removed
channels is part of a trial, so that more can go for the same drop. `target.py` is the other way to say how far: a MACs
or latency target.
"""

from collections.abc import Callable

from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.whole_parts import Part
from lowpass.pipeline.search.log import SearchLog
from lowpass.pipeline.search.log_entries import ChannelDecision, ClassifierDecision, TokenDecision, Trial
from lowpass.pipeline.search.shaping import first_keep
from lowpass.pipeline.search.state import SearchState, keeping
from lowpass.pipeline.search.sub_blocks import NOTHING_GONE, choose_of_the_rest, gone_rows, least_liked_first

RESOLUTION = 0.03  # an amount is found to this share of what the block has


def search_to_drop(state: SearchState, allowable_drop: float, log: SearchLog) -> None:
    """Prune in place, allowing `allowable_drop` points of top-1 in all."""
    model, settings = state.model, state.settings
    shaping, depth = settings.shaping, len(model.blocks)
    token_blocks = shaping.stages(depth) if settings.prune != "channels" else ()
    token_share = {"both": settings.token_share, "tokens": 1.0, "channels": 0.0}[settings.prune]
    top1 = state.top1(model.blocks)
    guesses = {"tokens": 0.1, "channels": 0.3}  # shares; once a block is done, what it came to
    for index in range(depth):
        floor = top1
        top1 = state.refit_attention_unless_worse(top1)
        if index in token_blocks:
            floor -= allowable_drop * token_share / len(token_blocks)
            tokens = log.next(TokenDecision, _drop_tokens, state, floor, top1, guesses)
            guesses["tokens"] = 1 - tokens.keep / model.blocks[index].tokens_in
            model.set_keep(index, tokens.keep)
            top1 = tokens.top1
        if settings.prune != "tokens":
            floor -= allowable_drop * (1 - token_share) / depth
            channels = log.next(ChannelDecision, _drop_channels, state, floor, top1, guesses)
            guesses["channels"] = channels.dropped / _channel_count(model.blocks[index])
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
        state.accept(state.cut(decision.choice))


def _drop_tokens(state: SearchState, floor: float, before: float, guesses: dict[str, float]) -> TokenDecision:
    """The fewest tokens that leave top-1 at or above `floor`; the count holds for all later blocks."""
    model, index, shaping = state.model, state.index, state.settings.shaping
    architecture = model.architecture
    have = architecture.blocks[index].keep
    fewest = min(have, first_keep(architecture)) if index == 0 else 1

    def keep_without(dropped: int) -> int:
        return shaping.keep(have - dropped, have, architecture.dense.num_prefix_tokens)

    def trial(dropped: int) -> float:
        with keeping(model, index, keep_without(dropped)):
            return state.top1(model.blocks[index:], floor)

    dropped, trials = largest_amount(have - fewest, have, guesses["tokens"], floor, trial)
    if architecture.with_keep(index, keep_without(dropped)).macs() > architecture.macs():
        dropped = 0  # the token filter would cost more than so few tokens save
    keep = keep_without(dropped)
    return TokenDecision(
        block=index,
        keep=keep,
        top1=trials[dropped] if dropped else before,
        macs=architecture.with_keep(index, keep).macs(),
        trials=tuple(Trial(amount=keep_without(amount), top1=top1) for amount, top1 in trials.items()),
    )


def _drop_channels(state: SearchState, floor: float, before: float, guesses: dict[str, float]) -> ChannelDecision:
    """The most channels, lowest scores first, that leave top-1 at or above `floor`."""
    model, index = state.model, state.index
    scores = state.channel_scores()
    gone, tried = _drop_parts(state, scores, floor) if state.settings.sub_blocks else (NOTHING_GONE, ())
    if tried and gone:
        before = max(trial.top1 for trial in tried if trial.amount == gone_rows(scores, gone))
    have = scores.rows - gone_rows(scores, gone)

    def choice(n: int) -> ChannelChoice:
        return choose_of_the_rest(scores, n, state.settings.shaping, gone)

    def trial(n: int) -> float:
        return state.top1_with(state.cut(choice(n)), floor)

    n, trials = largest_amount(have - 1, have, guesses["channels"], floor, trial) if have else (0, {})
    tried += tuple(Trial(amount=scores.rows - have + amount, top1=top1) for amount, top1 in trials.items())
    if not n and not gone:
        return _uncut(state, before).model_copy(update={"trials": tried})
    macs = model.architecture.with_block(index, choice(n).shape(model.blocks[index].keep)).macs()
    return ChannelDecision(
        block=index,
        dropped=scores.rows - have + n,
        choice=choice(n),
        top1=trials[n] if n else before,
        macs=macs,
        refits=state.cut(choice(n)).refits,
        trials=tried,
    )


def _drop_parts(state: SearchState, scores: ChannelScores, floor: float) -> tuple[frozenset[Part], tuple[Trial, ...]]:
    """Which parts of the block at hand may go whole, and every trial made. What the criterion likes least is tried
    first; attention that drops tokens stays."""
    gone, tried = NOTHING_GONE, list[Trial]()
    for part in least_liked_first(scores):
        if part == "attention" and state.model.blocks[state.index].scores_tokens:
            continue
        cut = state.cut(choose_of_the_rest(scores, 0, state.settings.shaping, gone | {part}))
        tried.append(Trial(amount=gone_rows(scores, gone | {part}), top1=state.top1_with(cut, floor)))
        if tried[-1].top1 >= floor:
            gone |= {part}
    return gone, tuple(tried)


def _uncut(state: SearchState, before: float) -> ChannelDecision:
    """No channel goes. What reads a stream that has changed is refitted, unless that lowers top-1."""
    model, index = state.model, state.index
    cut = state.cut(None)
    top1, refits = (state.top1_with(cut), cut.refits) if cut.refits else (before, ())
    if top1 < before:
        top1, refits = before, ()
    return ChannelDecision(block=index, choice=None, top1=top1, macs=model.architecture.macs(), refits=refits)


def _channel_count(block: SlimBlock) -> int:
    """Rows of a block's query, key, value and hidden layers."""
    shape = block.shape
    hidden = sum(layer.out_features for layer in block.mlp.first.values()) if block.has_mlp else 0
    return shape.heads * (2 * shape.qk_dim + shape.v_dim) + hidden


def largest_amount(
    limit: int, have: int, guess: float, floor: float, trial: Callable[[int], float]
) -> tuple[int, dict[int, float]]:
    """About the largest amount up to `limit` whose `trial` leaves top-1 at or above `floor`, and every trial made.

    From a guess (a share of `have`, such as what the block below came to) in doubling steps until one amount is
    accepted and one refused, then halving, to within `RESOLUTION` of `have`: blocks are alike, so that it takes few.
    """
    resolution = max(1, round(RESOLUTION * have))
    accepted, refused, trials = 0, limit + 1, dict[int, float]()
    amount, step = min(limit, max(1, round(guess * have))), resolution
    while refused - accepted > resolution or (refused > limit > accepted):
        trials[amount] = trial(amount)
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
