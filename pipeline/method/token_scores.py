"""The token score (paper, eq. 8 and 9), its rivals, and the tokens it keeps.

A new criterion is one function here, one line of `TOKEN_CRITERIA` and its name in `token_choices.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowpass.pipeline.method.energy import filtered_energy, low_frequency_energy
from lowpass.pipeline.method.token_choices import EnergyNorm, TokenCriterion, TokenScore


def attention_importance(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """The attention factor of the token score (eq. 8): what CLS receives from each image token, directly and through
    the others.

    Args:
        attention: softmax attention [B, H, P + N, P + N], row = query, CLS first.
        num_prefix_tokens: P.

    Returns:
        [B, N], FP32 or wider.
    """
    attention = attention.float()
    image_rows = attention[:, :, num_prefix_tokens:].mean(2)  # [B, H, P + N], averaged over image queries
    direct = attention[:, :, 0, num_prefix_tokens:] * image_rows[:, :, :1]
    indirect = attention[:, :, 0, :1] * image_rows[:, :, num_prefix_tokens:]
    return (direct + indirect).mean(1)


def cls_importance(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """The direct half of `attention_importance` alone: what CLS itself attends to, averaged over the heads (EViT's
    score). It needs one row of the attention matrix, so that attention can run fused.

    Args:
        attention: [B, H, 1 or P + N, P + N]; only the CLS row is read.
        num_prefix_tokens: P.

    Returns:
        [B, N], FP32 or wider.
    """
    heads = attention[:, :, 0, num_prefix_tokens:].float().unbind(1)
    # As sums, which runtimes fuse with what follows; a mean is a kernel of its own.
    return sum(heads[1:], heads[0]) / len(heads)


def received_importance(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """The attention factor where the mean of the image tokens is read in place of CLS (our extension): what each image
    token receives from all of them on average, `mean_h mean_i A_h[i, j]`.

    Args:
        attention: softmax attention [B, H, P + N, P + N], row = query.
        num_prefix_tokens: P.

    Returns:
        [B, N], FP32 or wider.
    """
    return attention[:, :, num_prefix_tokens:, num_prefix_tokens:].float().mean((1, 2))


IMPORTANCE: dict[TokenScore, Callable[[Tensor, int], Tensor]] = {"full": attention_importance, "cls": cls_importance}


def token_scores(
    tokens: Tensor, attention: Tensor, cutoff: float, norm: EnergyNorm = "l2", num_prefix_tokens: int = 1
) -> Tensor:
    """Attention importance times LFE (eq. 8-9).

    Args:
        tokens: image tokens [B, N, C] as they leave the attention residual, or [B, P + N, C] with the prefix tokens.
        attention: the block's softmax attention [B, H, P + N, P + N].
        cutoff: token cutoff in (0, 1).
        norm: the LFE norm.
        num_prefix_tokens: P where `tokens` holds the prefix tokens too; they are not scored.

    Returns:
        [B, N].

    Raises:
        ValueError: `attention` covers fewer tokens than are given.

    Example:
        >>> attention = torch.full((1, 2, 17, 17), 1 / 17)  # two heads, the CLS token and 16 image tokens
        >>> token_scores(torch.ones(1, 16, 4), attention, 0.85).shape
        torch.Size([1, 16])
    """
    length, count = attention.shape[-1], tokens.shape[1]
    if count > length:
        raise ValueError(f"attention covers {length} tokens, but {count} are given")
    if count == length:
        tokens = tokens[:, num_prefix_tokens:]
    else:
        num_prefix_tokens = length - count
    return attention_importance(attention, num_prefix_tokens) * low_frequency_energy(tokens, cutoff, norm)


@dataclass(frozen=True)
class SeenTokens:
    """What a block knows of its image tokens when it has to choose."""

    tokens: Tensor  # [B, P + N, C], as they leave the attention residual
    attention: Tensor  # as much of it as `token_score` reads; empty where the criterion reads none
    num_prefix_tokens: int
    lowpass: Tensor  # [N, N] or [P + N, N], see `filtered_energy`; empty where the criterion reads no energy
    chance: Tensor  # [N]; empty unless tokens are drawn
    energy_norm: EnergyNorm
    token_score: TokenScore
    mean_readout: bool = False  # the mean of the image tokens is read, not CLS; goes with the `full` score

    def importance(self) -> Tensor:
        """The attention factor [B, N] (eq. 8, its direct half, or without CLS the attention received)."""
        if self.mean_readout:
            return received_importance(self.attention, self.num_prefix_tokens)
        return IMPORTANCE[self.token_score](self.attention, self.num_prefix_tokens)

    def energy(self) -> Tensor:
        """LFE [B, N] (eq. 6)."""
        return filtered_energy(self.tokens, self.lowpass, self.energy_norm)


def energy_and_attention(seen: SeenTokens) -> Tensor:
    """The paper's score (eq. 9)."""
    return seen.importance() * seen.energy()


def attention_alone(seen: SeenTokens) -> Tensor:
    """With the `cls` score what EViT keeps (Liang et al., ICLR 2022)."""
    return seen.importance()


def energy_alone(seen: SeenTokens) -> Tensor:
    """LFE, whatever attends to it."""
    return seen.energy()


def random_positions(seen: SeenTokens) -> Tensor:
    """The same positions of every image, drawn once for each block: the floor for any criterion."""
    return seen.chance.float().expand(seen.tokens.shape[0], -1)


@dataclass(frozen=True)
class TokenScorer:
    """A token score [B, N], higher stays, and what it reads: the attention decides whether attention can run fused.
    Which read the energy is `READING_ENERGY`."""

    score: Callable[[SeenTokens], Tensor]
    reads_attention: bool = False
    draws: bool = False


TOKEN_CRITERIA: dict[TokenCriterion, TokenScorer] = {
    "lfe-attention": TokenScorer(energy_and_attention, reads_attention=True),
    "attention": TokenScorer(attention_alone, reads_attention=True),
    "lfe": TokenScorer(energy_alone),
    "random": TokenScorer(random_positions, draws=True),
}


def keep_tokens(tokens: Tensor, scores: Tensor, keep: int) -> Tensor:
    """Prefix tokens and the `keep` best-scored image tokens in raster order: [B, P + N, C], [B, N] -> [B, P + keep, C].

    The next block filters along the token axis, so the order must stay.
    """
    num_prefix_tokens = tokens.shape[1] - scores.shape[1]
    index = kept_indices(scores, keep)[..., None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:].gather(1, index)], 1)


def kept_indices(scores: Tensor, keep: int, ordered: bool = True) -> Tensor:
    """Indices [B, keep] of the best-scored image tokens, ascending, or in any order unless `ordered`. Sorted as FP32,
    which TensorRT's TopK takes."""
    best = scores.topk(keep, sorted=False).indices
    return best.float().topk(keep, largest=False, sorted=True).values.long() if ordered else best
