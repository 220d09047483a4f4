"""The `cls` token score in one kernel: what CLS attends to and the energy, as sums of one length.

TensorRT makes one kernel of sums that are equally long, and of what is computed from them. The energy sums over the
channels. So the softmax of CLS's row is written as a sum for each token j, as long as these:

    exp(l_j) / sum_i exp(l_i)  =  1 / sum_i exp(l_i - l_j)

It is as exact, and needs no maximum: what overflows is a weight of 0. As a softmax it would be a kernel of its own.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lowpass.pipeline.method.token_scores import SeenTokens, cls_importance


def cls_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """CLS's row before the softmax: [B, H, T, d] -> [B, H, 1, T] FP32.

    As products and sums, which TensorRT fuses with what comes before: for a MatMul of one row it would copy and pad the
    keys.
    """
    return ((query[:, :, :1] * scale).float() * key.float()).sum(-1).unsqueeze(2)


class SeenLogits(SeenTokens):
    """`SeenTokens` whose `attention` are `cls_logits`."""

    def importance(self) -> Tensor:
        """As `cls_importance`, for the `cls` score."""
        if not torch.onnx.is_in_onnx_export():  # PyTorch would write every difference to memory
            return cls_importance(self.attention.softmax(-1), self.num_prefix_tokens)
        return importance_by_sums(self.attention, self.num_prefix_tokens, self.tokens.shape[2])


def importance_by_sums(logits: Tensor, num_prefix_tokens: int, length: int) -> Tensor:
    """CLS's logits [B, H, 1, T] -> `cls_importance` of their softmax [B, N], in sums of `length` terms: shorter ones
    are filled up, longer ones folded.

    Heads are set apart first: with an axis of theirs the sums would have another shape than the energy's.
    """
    others = F.pad(logits, (0, -logits.shape[3] % length), value=-torch.inf)
    mine = logits[:, :, 0, num_prefix_tokens:, None]
    weights = []
    for other, own in zip(others.unbind(1), mine.unbind(1), strict=True):
        parts = other.split(length, -1) if other.shape[-1] > length else [other]
        terms = [(part - own).exp() for part in parts]
        weights.append(1 / sum(terms[1:], terms[0]).sum(-1))
    return sum(weights[1:], weights[0]) / len(weights)
