"""What a plan is made of: sizes that the parts of a block can be cut to, and what each loses."""

from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict


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
