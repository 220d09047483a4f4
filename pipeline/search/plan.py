"""A table of block shapes that meets a target at the least loss: a knapsack over the parts of all blocks.

Every part of a block (its attention, its token drop, its MLP) was cut alone to several sizes, and the loss of each
measured on the final logits. Losses are taken to add up; so do costs. Dynamic programming over parts and costs then
finds the combination of least loss within the target. The costs of a part depend on the tokens that reach it, so their
number is part of the state. An option of a part may be that it is gone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.search.costs import Costs, total
from lowpass.pipeline.search.curves import AttentionOption, BlockCurve, SizeOption

BINS = 8192  # of the target, in which costs are counted
NEAR = 0.99  # of the target: a table that costs less misses it
NEARNESS = (NEAR, 0.95, 0.9, 0.8, 0.6, 0.0)  # shares of the target, in which a table is looked for one after the other


def plan(
    curves: Sequence[BlockCurve], architecture: Architecture, costs: Costs, target: float
) -> tuple[BlockShape, ...] | None:
    """The table that loses least at a cost of at most `target`, or None where none is that cheap.

    Args:
        curves: of all blocks, from the bottom.
        architecture: the model they were measured on.
        costs: of parts, in the unit of `target`.
        target: see above.
    """
    best: _Table | None = None
    # From the last block with attention on, a block costs less: each that it may be is a problem of its own.
    for last in reversed(range(len(curves))):
        gone = [[option.loss for option in curve.attention if not option.heads] for curve in curves[last + 1 :]]
        if not all(gone) or (best is not None and best.near == NEAR and sum(map(min, gone)) >= best.loss):
            break
        table = _of_last(curves, architecture, costs, target, last)
        if table is not None and (best is None or (-table.near, table.loss) < (-best.near, best.loss)):
            best = table
    return None if best is None else best.blocks


class _Table(NamedTuple):
    blocks: tuple[BlockShape, ...]
    loss: float
    near: float


def _of_last(
    curves: Sequence[BlockCurve], architecture: Architecture, costs: Costs, target: float, last: int
) -> _Table | None:
    """See `plan`; of tables whose last block with attention is `last`."""
    problem = _Knapsack(curves, architecture, costs, target, last)
    final = problem.solve()
    # What is near the target goes first: a table further below it would only lose less by an accident of measuring.
    for near in NEARNESS:
        least = round((near * target - costs.ends()) / problem.unit)
        allowed = np.where(np.arange(final.shape[1]) >= least, final, np.inf)
        for flat in np.argsort(allowed, axis=None, kind="stable"):
            level, bin_ = divmod(int(flat), final.shape[1])
            if not np.isfinite(allowed[level, bin_]):
                break
            slim = architecture.model_copy(update={"blocks": problem.trace_back(level, bin_)})
            # Costs were rounded to bins; the exact one counts.
            if (cost := total(costs, slim)) <= target and not _wastes_a_stage(costs, slim, cost):
                return _Table(slim.blocks, float(final[level, bin_]), near)
    return None


def _wastes_a_stage(costs: Costs, slim: Architecture, cost: float) -> bool:
    """Whether a block drops tokens at a cost above what their absence saves: a table without that is better."""
    for index, block in enumerate(slim.blocks):
        tokens = slim.tokens_in(index)
        if block.keep < tokens:
            same = [later.keep == block.keep for later in slim.blocks[index:]]
            until = index + (same.index(False) if False in same else len(same))
            kept = [shape.model_copy(update={"keep": tokens}) for shape in slim.blocks[index:until]]
            blocks = (*slim.blocks[:index], *kept, *slim.blocks[until:])
            if total(costs, slim.model_copy(update={"blocks": blocks})) <= cost:
                return True
    return False


@dataclass(frozen=True)
class _Part:
    """One part of one block, once every state has passed it. `chosen` [levels, bins] is the option that led to a state
    (of a token drop: the level before it; of a choice: 1 where the block has no attention), `bins` [levels, options]
    what an option costs (of a drop: [levels, 1]), `attention` and `hidden` what the options are."""

    kind: Literal["attention", "tokens", "choice", "hidden"]
    chosen: NDArray[np.int32]
    bins: NDArray[np.int64]
    attention: Sequence[AttentionOption] = ()
    hidden: Sequence[SizeOption] = ()


class _Knapsack:
    """States are (count of tokens, cost so far); parts are taken in the order in which a token meets them. A block
    drops tokens by its attention, or has none: where it may do either, both ways are gone, and the better is taken."""

    def __init__(
        self, curves: Sequence[BlockCurve], architecture: Architecture, costs: Costs, target: float, last: int
    ) -> None:
        self.curves, self.costs, self.last = curves, costs, last
        self.prefix = architecture.dense.num_prefix_tokens
        counts = {architecture.dense.num_tokens} | {option.size for curve in curves for option in curve.tokens}
        self.levels = sorted(counts, reverse=True)
        self.unit = max(target - costs.ends(), 1e-9) / BINS
        self.width = BINS + 3 * len(curves)  # rounding may count a table that fits as one that does not
        self.parts: list[_Part] = []

    def solve(self) -> NDArray[np.float64]:
        """The least loss of every end state [levels, bins]."""
        state = np.full((len(self.levels), self.width), np.inf)
        state[0, 0] = 0.0
        for block, curve in enumerate(self.curves):
            last = block >= self.last
            there, gone = _attentions(curve, block, self.last)
            if there and curve.tokens:
                with_attention = self._tokens(self._attention(state, there, last), curve, last)
                state = self._either(with_attention, self._attention(state, gone, last)) if gone else with_attention
            else:
                state = self._attention(state, there + gone, last)
            costs = [
                [self.costs.mlp(n + self.prefix, option.size, last) for option in curve.hidden] for n in self.levels
            ]
            losses = [option.loss for option in curve.hidden]
            state = self._sized(state, losses, _Part("hidden", *self._marks(costs), hidden=curve.hidden))
        return state

    def _attention(
        self, state: NDArray[np.float64], options: Sequence[AttentionOption], last: bool
    ) -> NDArray[np.float64]:
        shapes = [_shape(option) for option in options]
        costs = [[self.costs.attention(n + self.prefix, shape, last) for shape in shapes] for n in self.levels]
        losses = [option.loss for option in options]
        return self._sized(state, losses, _Part("attention", *self._marks(costs), attention=options))

    def _sized(self, state: NDArray[np.float64], losses: Sequence[float], part: _Part) -> NDArray[np.float64]:
        after = self._pass(part)
        for level in range(len(self.levels)):
            for option, loss in enumerate(losses):
                _move(state[level], after[level], part.chosen[level], part.bins[level, option], loss, option)
        return after

    def _either(self, there: NDArray[np.float64], gone: NDArray[np.float64]) -> NDArray[np.float64]:
        part = _Part("choice", *self._marks([[0.0]] * len(self.levels)))
        self._pass(part)
        part.chosen[:] = gone < there
        return np.minimum(there, gone)

    def _tokens(self, state: NDArray[np.float64], curve: BlockCurve, last: bool) -> NDArray[np.float64]:
        """A drop from n to m tokens loses what keeping m here loses beyond what keeping n here would have lost."""
        losses = {option.size: option.loss for option in curve.tokens}
        sizes = sorted(losses)
        at = np.interp(self.levels, sizes, [losses[size] for size in sizes])
        part = _Part("tokens", *self._marks([[self.costs.selection(n, last)] for n in self.levels]))
        after = self._pass(part)
        for level, n in enumerate(self.levels):
            _move(state[level], after[level], part.chosen[level], 0, 0.0, level)
            for left, m in enumerate(self.levels):
                if m < n and m in losses:
                    loss = max(0.0, float(at[left] - at[level]))
                    _move(state[level], after[left], part.chosen[left], part.bins[level, 0], loss, level)
        return after

    def _marks(self, costs: list[list[float]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """`chosen` and `bins` of a part."""
        chosen = np.full((len(self.levels), self.width), -1, np.int32)
        return chosen, np.rint(np.asarray(costs) / self.unit).astype(np.int64)

    def _pass(self, part: _Part) -> NDArray[np.float64]:
        self.parts.append(part)
        return np.full(part.chosen.shape, np.inf)

    def trace_back(self, level: int, bin_: int) -> tuple[BlockShape, ...]:
        """The table that led to an end state."""
        blocks: list[BlockShape] = []
        keep, hidden, parts = self.levels[level], 1, list(self.parts)
        while parts:
            part = parts.pop()
            mark = int(part.chosen[level, bin_])
            if part.kind == "choice":
                # Of the two ways to here, the one without attention was gone last.
                del parts[slice(-3, -1) if mark else slice(-1, None)]
            elif part.kind == "tokens":
                bin_ -= 0 if mark == level else int(part.bins[mark, 0])
                level = mark
            elif part.kind == "hidden":
                bin_ -= int(part.bins[level, mark])
                keep, hidden = self.levels[level], part.hidden[mark].size
            else:
                bin_ -= int(part.bins[level, mark])
                shape = part.attention[mark]
                blocks.append(
                    BlockShape(heads=shape.heads, qk_dim=shape.qk_dim, v_dim=shape.v_dim, hidden=hidden, keep=keep)
                )
        return tuple(reversed(blocks))


def _attentions(curve: BlockCurve, block: int, last: int) -> tuple[list[AttentionOption], list[AttentionOption]]:
    """A block's options with attention and without, where `last` is the last block that has any."""
    there = [option for option in curve.attention if option.heads and block <= last]
    return there, [option for option in curve.attention if not option.heads and block != last]


def _shape(option: AttentionOption) -> BlockShape:
    return BlockShape(heads=option.heads, qk_dim=option.qk_dim, v_dim=option.v_dim, hidden=1, keep=1)


def _move(
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    chosen: NDArray[np.int32],
    bins: int,
    loss: float,
    mark: int,
) -> None:
    """All states of one level through one option, where that is better than what got there before."""
    if bins >= len(after):
        return
    candidate = before[: len(before) - bins] + loss
    better = candidate < after[bins:]
    after[bins:][better] = candidate[better]
    chosen[bins:][better] = mark


def lost(curves: Sequence[BlockCurve], architecture: Architecture, blocks: Sequence[BlockShape]) -> float:
    """What a table made of the curves' options loses, as `plan` adds it up."""
    tokens, sum_ = architecture.dense.num_tokens, 0.0
    for curve, shape in zip(curves, blocks, strict=True):
        sizes = (shape.heads, shape.qk_dim, shape.v_dim)
        sum_ += next(o.loss for o in curve.attention if (o.heads, o.qk_dim, o.v_dim) == sizes)
        sum_ += next(o.loss for o in curve.hidden if o.size == shape.hidden)
        if shape.keep < tokens:
            known = sorted((option.size, option.loss) for option in curve.tokens)
            sizes_, losses = [size for size, _ in known], [loss for _, loss in known]
            sum_ += max(0.0, float(np.interp(shape.keep, sizes_, losses) - np.interp(tokens, sizes_, losses)))
        tokens = shape.keep
    return sum_


def least_cost(curves: Sequence[BlockCurve], architecture: Architecture, costs: Costs) -> float:
    """Of the cheapest table that the curves' options can make."""
    prefix, found = architecture.dense.num_prefix_tokens, [math.inf]
    for last in reversed(range(len(curves))):
        least = {architecture.dense.num_tokens: costs.ends()}  # by the tokens that are left
        for block, curve in enumerate(curves):
            there, gone = _attentions(curve, block, last)
            after = dict[int, float]()
            for tokens, cost in least.items():
                ways = [(tokens, costs.attention(tokens + prefix, _shape(option), block >= last)) for option in gone]
                if there:
                    scored = min(costs.attention(tokens + prefix, _shape(option), block >= last) for option in there)
                    drop = costs.selection(tokens, block >= last)
                    ways.append((tokens, scored))
                    ways += [(option.size, scored + drop) for option in curve.tokens if option.size < tokens]
                for left, more in ways:
                    after[left] = min(cost + more, after.get(left, math.inf))
            least = {
                left: cost + min(costs.mlp(left + prefix, option.size, block >= last) for option in curve.hidden)
                for left, cost in after.items()
            }
        found.append(min(least.values(), default=math.inf))
    return min(found)
