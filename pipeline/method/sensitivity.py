"""LFS, low-frequency sensitivity: how much each channel matters to low-frequency images (paper, eq. 3-5).

Here are its loss and the sum over a row; `search/channel_criteria.py` takes the gradients between the two.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

ChannelCriterion = Literal["lfs", "obs", "taylor", "magnitude", "random"]


@dataclass(frozen=True)
class ChannelScores:
    """One block's channel scores; higher matters more.

    A query channel and the key channel it multiplies share one score, the sum of the two: `query_key` [H, Dqk].
    `value` [H, Dv] and `hidden` [M] stand alone. `heads` [H] is what whole heads are worth, where the criterion says;
    otherwise their channels do. `cumulative`: a score is what is lost once its channel and all below it are gone;
    otherwise it is the channel's own. All on the CPU, FP32.

    `step` 2: positions are rotary, and `query_key` [H, Dqk / 2] scores pairs of channels (i, i + Dqk / 2), of both
    queries and keys, for they go together. `gated`: a hidden channel has two rows, which it multiplies (SwiGLU). They
    share one score like a query and its key, the sum of the two.
    """

    query_key: Tensor
    value: Tensor
    hidden: Tensor
    heads: Tensor | None = None
    cumulative: bool = False
    step: int = 1
    gated: bool = False

    @property
    def qk_dim(self) -> int:
        """Query channels of a head."""
        return self.query_key.shape[1] * self.step

    @property
    def hidden_rows(self) -> int:
        """Rows of a hidden channel."""
        return 2 if self.gated else 1

    @property
    def rows(self) -> int:
        """Rows of query, key, value and hidden."""
        hidden = self.hidden_rows * len(self.hidden)
        return 2 * self.step * self.query_key.numel() + self.value.numel() + hidden


def sensitivity_loss(
    low_logits: Tensor, labels: Tensor, clean_token: Tensor, low_token: Tensor, weight: float
) -> Tensor:
    """The loss whose gradient LFS takes: `w CE(model(X~), y) + (1 - w) KL(softmax(T) || softmax(T~))` (eq. 3-4), with
    KL summed and divided by the number of elements.

    Args:
        low_logits: [B, classes] of low-passed images X~.
        labels: y [B].
        clean_token: T [B, C], the CLS token that leaves the scored block for the images X; no gradient flows into it.
        low_token: T~ [B, C], the same for X~.
        weight: w, the share of the cross-entropy, in [0, 1].

    A model that averages its image tokens has their mean in place of the CLS token.
    """
    divergence = F.kl_div(low_token.log_softmax(-1), clean_token.softmax(-1), reduction="sum") / clean_token.numel()
    return weight * F.cross_entropy(low_logits, labels) + (1 - weight) * divergence


def channel_scores(saliency: Iterable[Tensor], num_heads: int, step: int = 1) -> ChannelScores:
    """The sum of squares over each row (eq. 5). Our extension, for the paper has no gated MLP: both rows of a hidden
    channel share their sum, as a query and its key do.

    Args:
        saliency: a matrix for each of query [H * Dqk, C], key [H * Dqk, C], value [H * Dv, C] and hidden [M, C], of
            which a gated MLP has two. For LFS and Taylor it is gradient times weight; biases are left out.
        num_heads: H.
        step: of `ChannelScores`.
    """
    query, key, value, *first = (matrix.square().sum(1).float().cpu() for matrix in saliency)
    pairs = (query + key).unflatten(0, (num_heads, step, -1)).sum(1)
    hidden = sum(first[1:], first[0])
    return ChannelScores(pairs, value.unflatten(0, (num_heads, -1)), hidden, step=step, gated=len(first) == 2)
