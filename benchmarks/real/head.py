"""A linear classifier on frozen features."""

import warnings

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError

ITERATIONS = 300


def fit_head(features: Tensor, labels: Tensor, num_classes: int, c: float) -> nn.Linear:
    """Multinomial logistic regression on standardised features, the standardisation folded into the weights.

    Args:
        features: [n, C], FP32.
        labels: [n], each class at least once.
        num_classes: three or more.
        c: inverse strength of the L2 penalty, scikit-learn's `C`.

    Raises:
        InputError: a class has no image.
    """
    if missing := set(range(num_classes)) - set(labels.tolist()):
        raise InputError(f"no training image is of class number {min(missing)}; train on more images")
    scale = StandardScaler().fit(features.double().numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the figure on test images says how good it is
        fitted = LogisticRegression(C=c, max_iter=ITERATIONS).fit(
            scale.transform(features.double().numpy()), labels.numpy()
        )
    weight = torch.from_numpy(fitted.coef_ / scale.scale_)
    bias = torch.from_numpy(fitted.intercept_) - weight @ torch.from_numpy(scale.mean_)
    head = nn.Linear(features.shape[1], num_classes)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head


@torch.inference_mode()
def head_top1(head: nn.Linear, features: Tensor, labels: Tensor) -> float:
    """Top-1 in percent of a classifier on features [n, C]."""
    return 100 * float((head(features).argmax(-1) == labels).double().mean())
