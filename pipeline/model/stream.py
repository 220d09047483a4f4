"""What runs from block to block: tokens, and where positions are rotary, the place of each in the image.

Dropped tokens leave gaps, so that a token's place no longer follows from its row. It goes along as two channels more,
the token's row and column of the image's grid: what keeps a token keeps its place. Both are small whole numbers, exact
in FP16 and BF16. A layer that takes such a stream for tokens alone fails by its width.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

PLACE = 2  # channels
MOST = 256  # rows or columns: up to there BF16 is exact


class Stream(Protocol):
    """A way to carry tokens. Blocks read and change the stream through it alone."""

    def begin(self, tokens: Tensor) -> Any:
        """The stream that enters the first block, from all tokens [B, P + N, C]."""

    def tokens(self, stream: Any) -> Tensor:
        """[B, T, C], without places."""

    def add(self, stream: Any, branch: Tensor) -> Any:
        """With `branch` [B, T, C] added to the tokens."""

    def places(self, stream: Any) -> tuple[Tensor, ...]:
        """What attention has to be told: rows [B, T] of the table of angles; nothing where there are none to tell."""


class PlainStream:
    """Tokens alone."""

    def begin(self, tokens: Tensor) -> Tensor:
        """See `Stream`."""
        return tokens

    def tokens(self, stream: Tensor) -> Tensor:
        """See `Stream`."""
        return stream

    def add(self, stream: Tensor, branch: Tensor) -> Tensor:
        """See `Stream`."""
        return stream + branch

    def places(self, stream: Tensor) -> tuple[Tensor, ...]:
        """See `Stream`."""
        return ()


@dataclass(frozen=True)
class PlacedStream:
    """Tokens with their places: [B, P + N, C + 2]. A prefix token's is one in front of the image's first: the last row
    of the table that turns nothing. The grid has at most `MOST` rows and columns."""

    num_prefix_tokens: int
    grid: tuple[int, int]

    def begin(self, tokens: Tensor) -> Tensor:
        """See `Stream`."""
        rows, columns = self.grid
        index = torch.arange(rows * columns, device=tokens.device)
        image = torch.stack([index // columns, index % columns], 1)
        prefix = torch.tensor([[0, -1]], device=tokens.device).expand(self.num_prefix_tokens, -1)
        places = torch.cat([prefix, image]).to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens, places], -1)

    def tokens(self, stream: Tensor) -> Tensor:
        """See `Stream`."""
        return stream[..., :-PLACE]

    def add(self, stream: Tensor, branch: Tensor) -> Tensor:
        """See `Stream`."""
        return stream + F.pad(branch, (0, PLACE))

    def places(self, stream: Tensor) -> tuple[Tensor, ...]:
        """See `Stream`."""
        row, column = stream[..., -PLACE:].long().unbind(-1)
        return (self.num_prefix_tokens + row * self.grid[1] + column,)
