"""Token selection as deployed: lowerings of `keep_tokens`, which keep the same tokens."""

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from lowpass.export.options import Selection
from lowpass.pipeline.method.token_scores import kept_indices

SELECTIONS: tuple[Selection, ...] = get_args(Selection)


def gather_tokens(tokens: Tensor, scores: Tensor, keep: int, ordered: bool = True) -> Tensor:
    """TopK, then rows of the flattened batch: [B, P + N, C], [B, N] -> [B, P + keep, C].

    In raster order, for which a second TopK sorts, or in any unless `ordered`.

    Whole rows are copied, prefix tokens with the rest; `keep_tokens` itself would export an index as large as its
    output, and a concatenation.
    """
    return take_rows(tokens, kept_rows(tokens, scores, keep, ordered))


def kept_rows(tokens: Tensor, scores: Tensor, keep: int, ordered: bool) -> Tensor:
    """Which of all tokens stay, prefix tokens first: [B, P + N, C], [B, N] -> [B, P + keep]."""
    num_prefix_tokens = tokens.shape[1] - scores.shape[1]
    prefix = torch.arange(num_prefix_tokens, device=tokens.device).expand(tokens.shape[0], -1)
    return torch.cat([prefix, kept_indices(scores, keep, ordered) + num_prefix_tokens], 1)


def take_rows(tokens: Tensor, kept: Tensor) -> Tensor:
    """Whole rows: [B, T, C], [B, n] -> [B, n, C]."""
    batch, length, width = tokens.shape
    rows = kept + torch.arange(batch, device=tokens.device)[:, None] * length
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).view(batch, kept.shape[1], width)


def one_hot_tokens(tokens: Tensor, scores: Tensor, keep: int) -> Tensor:
    """No sort and no index: each token's rank by comparison, then a product with a one-hot matrix.

    Among equal scores the earlier token ranks higher, as in ONNX's TopK.
    """
    count = scores.shape[1]
    num_prefix_tokens = tokens.shape[1] - count
    mine, other = scores[:, :, None], scores[:, None, :]
    earlier = torch.ones(count, count, dtype=torch.bool, device=scores.device).tril(-1)
    rank = ((other > mine) | ((other == mine) & earlier)).float().sum(-1)
    stays = (rank < keep).float()
    # The k-th token that stays goes to row k; 0 marks those that do not.
    row = stays * (stays @ torch.ones(count, count, device=scores.device).triu())
    rows = torch.arange(1, keep + 1, dtype=row.dtype, device=scores.device)
    one_hot = (row[:, None, :] == rows[:, None]).to(tokens.dtype)
    return torch.cat([tokens[:, :num_prefix_tokens], one_hot @ tokens[:, num_prefix_tokens:]], 1)


def lowering(selection: Selection, ordered: bool) -> Callable[[Tensor, Tensor, int], Tensor]:
    """How a block keeps its tokens; unless `ordered`, nothing after it reads their order."""
    return partial(gather_tokens, ordered=ordered) if selection == "gather" else one_hot_tokens
