"""What a block costs, in MACs or in milliseconds measured on a runtime: what a target is planned by."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.architecture import Architecture, BlockShape, DenseViT


class Costs(Protocol):
    """Of one image, or of one batch. Tokens count the prefix tokens in, except where it says image tokens. `last`: of
    the last block, of which a deployed graph computes no more than the classifier reads."""

    def ends(self) -> float:
        """Patch embedding and classifier."""

    def attention(self, tokens: int, shape: BlockShape, last: bool) -> float:
        """Query, key, value, their products, and the projection; the norm and the residual."""

    def mlp(self, tokens: int, hidden: int, last: bool) -> float:
        """Both layers, the norm and the residual."""

    def selection(self, image_tokens: int, last: bool) -> float:
        """Scoring that many tokens and dropping some."""


def total(costs: Costs, architecture: Architecture) -> float:
    """The cost of a whole model."""
    prefix, sum_ = architecture.dense.num_prefix_tokens, costs.ends()
    for index, block in enumerate(architecture.blocks):
        image_tokens, last = architecture.tokens_in(index), index == architecture.dense.depth - 1
        sum_ += costs.attention(image_tokens + prefix, block, last) + costs.mlp(block.keep + prefix, block.hidden, last)
        if block.keep < image_tokens:
            sum_ += costs.selection(image_tokens, last)
    return sum_


class Macs:
    """Multiply-accumulates of one image; `total` is `Architecture.macs`, which counts the last block like any other, as
    all that is published does."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture, self.dense = architecture, architecture.dense

    def ends(self) -> float:
        """See `Costs`."""
        return self.dense.end_macs()

    def attention(self, tokens: int, shape: BlockShape, last: bool) -> float:
        """See `Costs`."""
        return self.dense.attention_macs(tokens, shape)

    def mlp(self, tokens: int, hidden: int, last: bool) -> float:
        """See `Costs`."""
        return self.dense.mlp_macs(tokens, hidden)

    def selection(self, image_tokens: int, last: bool) -> float:
        """See `Costs`."""
        return self.architecture.selection_macs(image_tokens)


class LatencyTable(BaseModel):
    """Milliseconds of the parts of one dense model's blocks at one batch size, measured on one runtime of one machine.

    `attention_ms[i][j]` belongs to `tokens[i]` tokens (prefix tokens included) and `rows[j]` query/key and value rows,
    `heads * (qk_dim + v_dim)`; `mlp_ms[i][j]` to `hidden[j]`; `last_ms[i]` to the fewest and the most rows, and is
    all of the last block. In between it is interpolated.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dense: DenseViT
    runtime: str
    precision: str
    batch: int
    token_score: str
    token_criterion: str
    machine: dict[str, str]
    ends_ms: float
    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    hidden: tuple[int, ...]
    attention_ms: tuple[tuple[float, ...], ...]
    mlp_ms: tuple[tuple[float, ...], ...]
    selection_ms: tuple[float, ...]
    last_ms: tuple[tuple[float, float], ...]

    def ends(self) -> float:
        """See `Costs`."""
        return self.ends_ms

    def attention(self, tokens: int, shape: BlockShape, last: bool) -> float:
        """See `Costs`."""
        rows = shape.heads * (shape.qk_dim + shape.v_dim)
        points, grid = ((self.rows[0], self.rows[-1]), self.last_ms) if last else (self.rows, self.attention_ms)
        return _between(self.tokens, [_between(points, row, rows) for row in grid], tokens)

    def mlp(self, tokens: int, hidden: int, last: bool) -> float:
        """See `Costs`."""
        if last:  # a row an image, in `last_ms` however wide
            return 0.0
        return _between(self.tokens, [_between(self.hidden, row, hidden) for row in self.mlp_ms], tokens)

    def selection(self, image_tokens: int, last: bool) -> float:
        """See `Costs`."""
        if last:  # nobody reads what it would select
            return 0.0
        return _between(self.tokens, self.selection_ms, image_tokens + self.dense.num_prefix_tokens)


def read_table(path: Path) -> LatencyTable:
    """A table that `lowpass profile` wrote.

    Raises:
        InputError: it is missing or malformed.
    """
    try:
        return LatencyTable.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the latency table {path}: {error.strerror}; run `lowpass profile`") from None
    except ValidationError:
        raise InputError(f"{path} is not a latency table; run `lowpass profile` again") from None


def _between(points: Sequence[int], values: Sequence[float], at: int) -> float:
    """Piecewise linear through ascending points, and on along the outermost two; a cost is never negative."""
    if points[0] == points[-1]:
        return values[0]
    upper = min(max(bisect_right(points, at), 1), len(points) - 1)
    low, high = points[upper - 1], points[upper]
    return max(0.0, values[upper - 1] + (values[upper] - values[upper - 1]) * (at - low) / (high - low))
