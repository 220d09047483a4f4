"""Rotary positions: where a token is turns its queries and keys (Su et al., 2021), along both axes of an image (Heo et
al., ECCV 2024; DINOv3, Simeoni et al., 2025).

Channels i and i + D/2 of a head of D are the two coordinates of a point. Turned by angles that grow with a token's
place, a query and a key meet at an angle that says how far apart their tokens are.
"""

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


class Rotary(BaseModel):
    """The angles of an image's tokens, each pair of numbers for rows and columns.

    Of the D/2 pairs of a head the first half turns along one axis, the second along the other; `columns_first`: along
    columns first. Pair k of the q along an axis turns by `step * (index + offset) * temperature^(-k / q)` radians.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Annotated[float, Field(gt=0)]
    step: tuple[float, float]
    offset: tuple[float, float]
    columns_first: bool = False


def rotary_table(rotary: Rotary, grid: tuple[int, int], pairs: int, num_prefix_tokens: int = 0) -> Tensor:
    """Cosines and sines for every token and pair of a head: [2, P + N, pairs] FP32, the image's N tokens in raster
    order. Prefix tokens have no place in the image and are not turned.

    Args:
        rotary: the angles.
        grid: rows and columns of the image's tokens.
        pairs: of a whole head, D/2.
        num_prefix_tokens: P.

    Raises:
        ValueError: the pairs do not go evenly to both axes.
    """
    if pairs % 2:
        raise ValueError(f"{pairs} pairs cannot be shared by rows and columns")
    quarter = pairs // 2
    frequencies = rotary.temperature ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (
        step * (torch.arange(size, dtype=torch.float64) + offset)[:, None] * frequencies
        for size, step, offset in zip(grid, rotary.step, rotary.offset, strict=True)
    )
    axes = [rows[:, None].expand(*grid, quarter), columns[None].expand(*grid, quarter)]
    angles = torch.cat(axes[::-1] if rotary.columns_first else axes, -1).flatten(0, 1)
    angles = torch.cat([angles.new_zeros(num_prefix_tokens, pairs), angles])
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Queries or keys [..., D], each pair (i, i + D/2) turned by its angle, whose cosine and sine are [..., D/2]."""
    one, two = heads.chunk(2, -1)
    return torch.cat([one * cosine - two * sine, two * cosine + one * sine], -1)


def whole_pairs(pairs: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The channels of a head of `size` that make up some pairs, ascending."""
    return (*pairs, *(pair + size // 2 for pair in pairs))


def pairs_of(channels: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The pairs that some channels of a head of `size` make up.

    Raises:
        ValueError: a channel is there without the other of its pair, which turns it.
    """
    pairs = tuple(channel for channel in channels if channel < size // 2)
    if whole_pairs(pairs, size) != tuple(channels):
        raise ValueError("rotary positions turn channels by pairs: one cannot stay without the other")
    return pairs
