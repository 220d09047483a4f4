"""Milliseconds of the parts of a block, measured on a runtime: what a latency target is planned by."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.architecture import DenseViT


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
        if not rows:
            return 0.0
        short = self._short(last)
        points, grid = ((self.rows[0], self.rows[-1]), self.last_ms) if short else (self.rows, self.attention_ms)
        return _between(self.tokens, [_between(points, row, rows) for row in grid], tokens)

    def mlp(self, tokens: int, hidden: int, last: bool) -> float:
        """See `Costs`."""
        # A row an image: in `last_ms`, however wide and whether there or not; nothing in blocks above it.
        if self._short(last) or not hidden:
            return 0.0
        return _between(self.tokens, [_between(self.hidden, row, hidden) for row in self.mlp_ms], tokens)

    def selection(self, image_tokens: int, last: bool) -> float:
        """See `Costs`."""
        if self._short(last):  # nobody reads what it would select
            return 0.0
        return _between(self.tokens, self.selection_ms, image_tokens + self.dense.num_prefix_tokens)

    def _short(self, last: bool) -> bool:
        """Whether a block is computed for a row or two alone. Where image tokens are read, the last is not."""
        return last and not self.dense.reads_image_tokens


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
