"""A file and PyTorch on the same images, image by image."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowpass.export.onnx.bounds import TOKEN_TIE, Bound
from lowpass.export.runtimes.session import Images, Session, logits_of
from lowpass.pipeline.model.slim_vit import SlimViT

KeepTokens = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Compared:
    """Of each image, in order."""

    differences: NDArray[np.float64]  # the largest of any logit; infinite where one is no number
    same: NDArray[np.bool_]  # top-1
    tied: NDArray[np.bool_]  # rounding decides about top-1: of two logits, or two tokens, neither is ahead
    largest_logit: float  # of PyTorch, on any image


def compared(
    session: Session, model: SlimViT, batches: Iterable[Images], bound: Bound, in_doubt: bool = False
) -> Compared:
    """Run both on every image.

    With `in_doubt`, an image that differs by more than `bound` is compared with PyTorch in FP64 as well: two tokens may
    score alike to the last bit of FP32, and PyTorch itself may keep the wrong one. There is no right one where FP64 has
    them apart by no more than `TOKEN_TIE`.

    Raises:
        ValueError: there are no images.
    """
    exact: _Exact | None = None
    differences, same, tied, largest = list[Any](), list[Any](), list[Any](), 0.0
    for images in batches:
        with torch.inference_mode():
            expected = model(torch.from_numpy(images)).numpy()
        got = logits_of(session, images)
        scale = float(np.abs(expected).max())
        off, first = _apart(got, expected), got.argmax(-1)
        tie = _lead(expected) <= bound.tie * scale
        doubtful = (off > bound.difference * scale) | (first != expected.argmax(-1))
        if in_doubt and doubtful.any():
            exact = exact or _Exact(model)  # most files are never in doubt
            true, gap = exact(images[doubtful])
            off[doubtful] = np.minimum(off[doubtful], _apart(got[doubtful], true))
            tie[doubtful] |= (gap <= TOKEN_TIE) | (first[doubtful] == true.argmax(-1))
        differences.append(off)
        same.append(first == expected.argmax(-1))
        tied.append(tie)
        largest = max(largest, scale)
    if not differences:
        raise ValueError("verification needs at least one image")
    return Compared(np.concatenate(differences), np.concatenate(same), np.concatenate(tied), largest)


class _Exact:
    """PyTorch in FP64, and how near to a tie its choice of tokens is."""

    def __init__(self, model: SlimViT) -> None:
        self.model = copy.deepcopy(model).double()
        self.gaps = list[Tensor]()
        for block in self.model.blocks:
            block.keep_tokens = self._noting(block.keep_tokens)

    def __call__(self, images: Images) -> tuple[NDArray[Any], NDArray[Any]]:
        """Logits [B, classes], and the least relative gap [B] between the last token that stays and the first to go."""
        self.gaps = [torch.full((len(images),), torch.inf, dtype=torch.float64)]
        with torch.inference_mode():
            logits = self.model(torch.from_numpy(images).double()).numpy()
        return logits, torch.stack(self.gaps).amin(0).numpy()

    def _noting(self, select: KeepTokens) -> KeepTokens:
        def noting(tokens: Tensor, scores: Tensor, keep: int) -> Tensor:
            last, next_one = scores.double().topk(keep + 1).values[:, -2:].unbind(-1)
            self.gaps.append((last - next_one) / last.abs().clamp_min(torch.finfo(torch.float32).tiny))
            return select(tokens, scores, keep)

        return noting


def _lead(logits: NDArray[Any]) -> NDArray[Any]:
    """How far the first logit is ahead of the second [B]; infinite where there is one class."""
    if logits.shape[1] == 1:
        return np.full(len(logits), np.inf)
    second, first = np.sort(logits, 1)[:, -2:].T
    lead: NDArray[Any] = first - second
    return lead


def _apart(got: Images, expected: NDArray[Any]) -> NDArray[np.float64]:
    """The largest difference of any logit [B]; infinite where one is no number."""
    return np.nan_to_num(np.abs(got - expected.astype(np.float64)), nan=np.inf, posinf=np.inf).max(1)
