"""How near an exported file must come to PyTorch."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowpass.export.options import Precision


@dataclass(frozen=True)
class Bound:
    """What a precision is held to. Differences are shares of the largest logit: logits have no scale of their own."""

    difference: float  # the most that the largest difference of any logit of an image may be ...
    quantile: (
        float  # ... on this share of the images: where tokens tie, another may stay, and single logits move by much
    )
    top1: float  # least share of images with the same top-1, ties aside; percent, rounded up to whole images
    tie: float  # two logits that are no further apart than this are equal: rounding decides which of them is top-1


# In FP32 a file does what PyTorch does, on all but one image in 100. In the other precisions the median image is held
# to several times what it was seen to be off by on the digits (FP16 0.05, BF16 0.4, INT8 0.8 % of the largest logit):
# where images are few, that tells another model, which top-1 alone does not. FP16 and BF16 take two logits for equal
# within their own unit roundoff.
BOUNDS: dict[Precision, Bound] = {
    "fp32": Bound(1e-4, 0.99, 100.0, 1e-4),
    "fp16": Bound(5e-3, 0.5, 99.5, 2.0**-11),
    "bf16": Bound(3e-2, 0.5, 99.5, 2.0**-8),
    "int8": Bound(5e-2, 0.5, 99.0, 1e-4),
    "int8-fp16": Bound(5e-2, 0.5, 99.0, 2.0**-11),
    "fp8": Bound(5e-2, 0.5, 99.0, 2.0**-11),
}
TOKEN_TIE = 1e-5  # token scores in FP32 that are no further apart, relatively, may come out in either order


def usual(differences: NDArray[np.float64], bound: Bound) -> float:
    """The difference that `bound` is about: of `bound.quantile` of the images no more; of few images that is all."""
    ordered = np.sort(differences)
    return float(ordered[len(ordered) - 1 - math.floor((1 - bound.quantile) * len(ordered) + 1e-9)])


def allowed_wrong(images: int, bound: Bound) -> int:
    """How many images may have another top-1. A share of few images is a whole image: one of 20 is 5 %."""
    return math.ceil((100 - bound.top1) / 100 * images - 1e-9)
