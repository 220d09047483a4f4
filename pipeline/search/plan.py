"""A table of block shapes that meets a target at the least loss: a knapsack over the parts of all blocks.

Every part of a block (its attention, its token drop, its MLP) was cut alone to several sizes, and the loss of each
measured on the final logits. Losses are taken to add up; so do costs. Dynamic programming over parts and costs then
finds the combination of least loss within the target. The costs of a part depend on the tokens that reach it, so their
number is part of the state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.search.costs import Costs, total

BINS = 8192  # of the target, in which costs are counted
NEAR = 0.99  # of the target: a table that costs less misses it


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AttentionOption(_Frozen):
    """Heads and their sizes, and what they lose."""

    heads: int
    qk_dim: int
    v_dim: int
    loss: float


class SizeOption(_Frozen):
    """A hidden width, or a count of image tokens, and what it loses."""

    size: int
    loss: float


class BlockCurve(_Frozen):
    """What cutting one block alone loses. Each part has its whole size among its options, at no loss. `tokens` is empty
    where no token may go."""

    attention: tuple[AttentionOption, ...]
    hidden: tuple[SizeOption, ...]
    tokens: tuple[SizeOption, ...]


def falling(size: int) -> float:
    """What `interpolated` goes along where nothing better is known."""
    return -size


def interpolated(
    measured: Sequence[SizeOption], sizes: Sequence[int], along: Callable[[int], float] = falling
) -> tuple[SizeOption, ...]:
    """Losses at all `sizes` from those that were measured, never falling as a size falls.

    Args:
        measured: some sizes.
        sizes: those that are wanted.
        along: of a size, falling as it grows, what the loss is piecewise linear in.
    """
    points = sorted((along(option.size), option.loss) for option in measured)
    known = np.maximum.accumulate(np.array([loss for _, loss in points]))
    losses = np.interp([along(size) for size in sizes], [place for place, _ in points], known)
    return tuple(SizeOption(size=size, loss=float(loss)) for size, loss in zip(sizes, losses, strict=True))


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
    problem = _Knapsack(curves, architecture, costs, target)
    final = problem.solve()
    # What is near the target goes first: a table further below it would only lose less by an accident of measuring.
    near = round((NEAR * target - costs.ends()) / problem.unit)
    for bins in (np.arange(final.shape[1]) >= near, np.full(final.shape[1], True)):
        allowed = np.where(bins, final, np.inf)
        for flat in np.argsort(allowed, axis=None, kind="stable"):
            level, bin_ = divmod(int(flat), final.shape[1])
            if not np.isfinite(allowed[level, bin_]):
                break
            blocks = problem.trace_back(level, bin_)
            # Costs were rounded to bins; the exact one counts.
            if total(costs, architecture.model_copy(update={"blocks": blocks})) <= target:
                return blocks
    return None


@dataclass(frozen=True)
class _Part:
    """One part of one block, once every state has passed it. `chosen` [levels, bins] is the option that led to a state
    (of a token drop: the level before it), `bins` [levels, options] what an option costs (of a drop: [levels, 1])."""

    kind: Literal["attention", "tokens", "hidden"]
    block: int
    chosen: NDArray[np.int32]
    bins: NDArray[np.int64]


class _Knapsack:
    """States are (count of tokens, cost so far); parts are taken in the order in which a token meets them."""

    def __init__(self, curves: Sequence[BlockCurve], architecture: Architecture, costs: Costs, target: float) -> None:
        self.curves, self.costs = curves, costs
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
            shapes = [
                BlockShape(heads=o.heads, qk_dim=o.qk_dim, v_dim=o.v_dim, hidden=1, keep=1) for o in curve.attention
            ]
            last = block == len(self.curves) - 1
            costs = [[self.costs.attention(n + self.prefix, shape, last) for shape in shapes] for n in self.levels]
            state = self._sized(state, "attention", block, [option.loss for option in curve.attention], costs)
            if curve.tokens:
                state = self._tokens(state, block, last)
            costs = [
                [self.costs.mlp(n + self.prefix, option.size, last) for option in curve.hidden] for n in self.levels
            ]
            state = self._sized(state, "hidden", block, [option.loss for option in curve.hidden], costs)
        return state

    def _sized(
        self,
        state: NDArray[np.float64],
        kind: Literal["attention", "hidden"],
        block: int,
        losses: list[float],
        costs: list[list[float]],
    ) -> NDArray[np.float64]:
        after, part = self._pass(state, kind, block, costs)
        for level in range(len(self.levels)):
            for option, loss in enumerate(losses):
                _move(state[level], after[level], part.chosen[level], part.bins[level, option], loss, option)
        return after

    def _tokens(self, state: NDArray[np.float64], block: int, last: bool) -> NDArray[np.float64]:
        """A drop from n to m tokens loses what keeping m here loses beyond what keeping n here would have lost."""
        losses = {option.size: option.loss for option in self.curves[block].tokens}
        sizes = sorted(losses)
        at = np.interp(self.levels, sizes, [losses[size] for size in sizes])
        after, part = self._pass(state, "tokens", block, [[self.costs.selection(n, last)] for n in self.levels])
        for level, n in enumerate(self.levels):
            _move(state[level], after[level], part.chosen[level], 0, 0.0, level)
            for left, m in enumerate(self.levels):
                if m < n and m in losses:
                    loss = max(0.0, float(at[left] - at[level]))
                    _move(state[level], after[left], part.chosen[left], part.bins[level, 0], loss, level)
        return after

    def _pass(
        self,
        state: NDArray[np.float64],
        kind: Literal["attention", "tokens", "hidden"],
        block: int,
        costs: list[list[float]],
    ) -> tuple[NDArray[np.float64], _Part]:
        bins = np.rint(np.asarray(costs) / self.unit).astype(np.int64)
        self.parts.append(_Part(kind, block, np.full(state.shape, -1, np.int32), bins))
        return np.full_like(state, np.inf), self.parts[-1]

    def trace_back(self, level: int, bin_: int) -> tuple[BlockShape, ...]:
        """The table that led to an end state."""
        blocks: list[BlockShape] = []
        keep, hidden = self.levels[level], 1
        for part in reversed(self.parts):
            mark = int(part.chosen[level, bin_])
            curve = self.curves[part.block]
            if part.kind == "tokens":
                bin_ -= 0 if mark == level else int(part.bins[mark, 0])
                level = mark
                continue
            bin_ -= int(part.bins[level, mark])
            if part.kind == "hidden":
                keep, hidden = self.levels[level], curve.hidden[mark].size
            else:
                shape = curve.attention[mark]
                blocks.append(
                    BlockShape(heads=shape.heads, qk_dim=shape.qk_dim, v_dim=shape.v_dim, hidden=hidden, keep=keep)
                )
        return tuple(reversed(blocks))


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


def cheapest(curves: Sequence[BlockCurve], architecture: Architecture) -> tuple[BlockShape, ...]:
    """Every part at its smallest."""
    keep, blocks = architecture.dense.num_tokens, []
    for curve in curves:
        keep = min([keep, *(option.size for option in curve.tokens)])
        least = min(curve.attention, key=lambda option: option.heads * (option.qk_dim + option.v_dim))
        hidden = min(option.size for option in curve.hidden)
        blocks.append(BlockShape(heads=least.heads, qk_dim=least.qk_dim, v_dim=least.v_dim, hidden=hidden, keep=keep))
    return tuple(blocks)


def refuse_unreachable(
    curves: Sequence[BlockCurve], architecture: Architecture, costs: Costs, target: float, unit: str
) -> None:
    """Refuse a target that no table meets.

    Raises:
        InputError: with the least that can be reached.
    """
    least = total(costs, architecture.model_copy(update={"blocks": cheapest(curves, architecture)}))
    if target < least:
        raise InputError(f"a target of {target:g} {unit} is out of reach: at least {least:.4g} {unit} remain")
