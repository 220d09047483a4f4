"""Sums over images that several processes have among them: each sums over its own, and `AddUp` adds up the sums."""

from collections.abc import Callable, Sequence

from torch import Tensor

AddUp = Callable[[Sequence[Tensor] | None], Sequence[Tensor] | None]  # None: there are no images


def alone(own: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    """Of one process."""
    return own
