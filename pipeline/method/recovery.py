"""Recovery without training: what reads removed channels, or a stream that has changed, is refitted in closed form.

The projection and the second MLP layer of a pruned block are fitted by ridge regression so that the residual stream
comes as near as it can to the dense model's on the same images. So are query, key, value and the first MLP layer, by
what the dense model's give, where cuts below have changed what they read; last the classifier, by the dense model's
logits. The ridge pulls towards the weights that are there, and is chosen on held-out images, which then count too. A
refit that does not lower the held-out error is not taken. Everything is in FP64.

Related: CORP (arXiv 2602.05243), Variance-Based Pruning (arXiv 2507.12988).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean square of a feature
RIDGE_TOLERANCE = 0.01  # of the least held-out error
HELD_OUT_EVERY = 4  # every fourth image judges
SMALLEST_SCALE = 1e-6  # layer scale below which an output channel is left alone: dividing by it would blow up noise


class Refit(BaseModel):
    """One layer: the held-out squared error before and after, per row, and the ridge; None: kept as it was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    before: float
    after: float
    ridge: float | None


@dataclass(frozen=True)
class Moments:
    """What ridge regression needs of features [rows, k] and targets [rows, C]: weighted sums of products, FP64.

    The features end with a constant 1, whose weight is the bias.
    """

    gram: Tensor  # [k + 1, k + 1]
    cross: Tensor  # [k + 1, C]
    energy: Tensor  # of the targets [C]
    weight: float  # of all rows

    def take(self, channels: Iterable[int]) -> "Moments":
        """Of some features only."""
        index = torch.tensor([*channels, len(self.gram) - 1], device=self.gram.device)
        return replace(self, gram=self.gram[index][:, index], cross=self.cross[index])

    def error(self, solution: Tensor, unit: Tensor | None = None) -> float:
        """Mean squared error, per row, of `solution` [k + 1, C]; `unit` [C] multiplies the channels first."""
        squared = (solution * (self.gram @ solution - 2 * self.cross)).sum(0) + self.energy
        if unit is not None:
            squared = squared * unit.double().square()
        total = squared.sum().item()
        return 0.0 if total < 0 else total / self.weight  # rounding can take a difference of sums below 0


Rows = tuple[Tensor, Tensor, Tensor]  # features [B, T, k], targets [B, T, C], weights of the tokens [T]
# Where several processes have some of the images each: from sums over one's own to those over all. None: one has none.
AddUp = Callable[[Sequence[Tensor] | None], Sequence[Tensor] | None]


def alone(own: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    """`AddUp` of one process."""
    return own


def moments(
    batches: Iterable[Rows], starts: Sequence[int] | None = None, add_up: AddUp = alone
) -> tuple[Moments, Moments]:
    """Of the images to fit on, and of those held out.

    Args:
        batches: of some images.
        starts: how many images there are before each batch; None: those of the batches before it.
        add_up: adds up what several processes found.

    Raises:
        ValueError: there are too few images to hold one out.
    """
    sums: list[Moments | None] = [None, None]
    seen = 0
    for number, (features, targets, weights) in enumerate(batches):
        first = seen if starts is None else starts[number]
        held = (torch.arange(first, first + len(features)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1).to(features.device)
        seen += len(features)
        for side, chosen in enumerate((~held, held)):
            if bool(chosen.any()):
                part = _sums(features[chosen], targets[chosen], weights)
                sums[side] = part if sums[side] is None else _add(cast(Moments, sums[side]), part)
    fitted, judged = (_of_all(side, add_up) for side in sums)
    if fitted is None or judged is None:
        raise ValueError(f"recovery needs at least {HELD_OUT_EVERY} images")
    return fitted, judged


def _sums(features: Tensor, targets: Tensor, weights: Tensor) -> Moments:
    rows = weights > 0
    weight = weights[rows].double().repeat(len(features))[:, None]
    x = features[:, rows].flatten(0, 1).double()
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    y = targets[:, rows].flatten(0, 1).double()
    weighted = x * weight
    return Moments(weighted.T @ x, weighted.T @ y, (y.square() * weight).sum(0), weight.sum().item())


def _of_all(own: Moments | None, add_up: AddUp) -> Moments | None:
    """Moments of all processes from those of one."""
    parts = None if own is None else (own.gram, own.cross, own.energy, torch.tensor(own.weight, dtype=torch.float64))
    sums = add_up(parts)
    if sums is None:
        return None
    gram, cross, energy, weight = sums
    return Moments(gram, cross, energy, float(weight))


def _add(one: Moments, two: Moments) -> Moments:
    return Moments(one.gram + two.gram, one.cross + two.cross, one.energy + two.energy, one.weight + two.weight)


def refit(layer: nn.Linear, name: str, fitted: Moments, judged: Moments, unit: Tensor | None = None) -> Refit:
    """Replace weight and bias of `layer` by a ridge solution, if that does better on held-out images.

    Minimises `|X W - Y|^2 + ridge * m |W - W0|^2`, W0 what is there now, m the mean square of a feature; the bias is
    not held back. The ridge is the largest whose held-out error is within `RIDGE_TOLERANCE` of the least: the error
    is flat there, and what moves less from W0 quantises better and holds for other images. The solution taken is that
    of all images together. The errors told are those of the solution that has not seen the held-out ones.

    Args:
        layer: in place.
        name: of the layer, to be told.
        fitted: of the images to fit on.
        judged: of those held out.
        unit: [C], by which the layer's channels are multiplied before they join the stream (layer scale, of which
            `unscaled` has freed the targets): held-out errors are those of the stream. A channel that hardly reaches
            it would decide otherwise, for its error is divided by next to nothing.
    """
    assert layer.bias is not None
    now = torch.cat([layer.weight.detach().T, layer.bias.detach()[None]]).double()
    before = judged.error(now, unit)
    solutions = {ridge: _ridge_solution(fitted, now, ridge) for ridge in RIDGES}
    errors = {ridge: judged.error(solution, unit) for ridge, solution in solutions.items() if solution is not None}
    least = min(errors.values(), default=before)
    if not least < before:
        return Refit(layer=name, before=before, after=before, ridge=None)
    ridge = max(ridge for ridge, error in errors.items() if error <= min(before, least * (1 + RIDGE_TOLERANCE)))
    taken = _ridge_solution(_add(fitted, judged), now, ridge)
    if taken is None:
        taken = cast(Tensor, solutions[ridge])
    with torch.no_grad():
        layer.weight.copy_(taken[:-1].T)
        layer.bias.copy_(taken[-1])
    return Refit(layer=name, before=before, after=errors[ridge], ridge=ridge)


def _ridge_solution(seen: Moments, now: Tensor, ridge: float) -> Tensor | None:
    """Weight and bias [k + 1, C]; None: the system has no solution."""
    penalty = torch.zeros_like(seen.gram.diagonal())
    penalty[:-1] = ridge * seen.gram.diagonal()[:-1].mean()
    penalty[-1] = 1e-9 * seen.gram[-1, -1]
    factor, failed = torch.linalg.cholesky_ex(seen.gram + penalty.diag())
    return None if int(failed) else now + torch.cholesky_solve(seen.cross - seen.gram @ now, factor)


def refit_together(layers: Sequence[nn.Linear], name: str, fitted: Moments, judged: Moments) -> Refit:
    """`refit` for layers that read the same; the targets are theirs side by side."""
    if len(layers) == 1:
        return refit(layers[0], name, fitted, judged)
    joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers)).to(layers[0].weight)
    sizes = [layer.out_features for layer in layers]
    with torch.no_grad():
        joined.weight.copy_(torch.cat([layer.weight for layer in layers]))
        joined.bias.copy_(torch.cat([layer.bias for layer in layers]))
        done = refit(joined, name, fitted, judged)
        for layer, weight, bias in zip(layers, joined.weight.split(sizes), joined.bias.split(sizes), strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return done


def unscaled(difference: Tensor, gamma: Tensor | None, layer: nn.Module, features: Tensor) -> Tensor:
    """What `layer` must give of `features` so that it is `difference` [B, T, C] once scaled by layer scale `gamma` [C]
    (None: there is none); where that has switched a channel off, what the layer gives now."""
    if gamma is None:
        return difference
    usable = gamma.abs() > SMALLEST_SCALE
    return torch.where(usable, difference / torch.where(usable, gamma, 1), layer(features))


@dataclass(frozen=True)
class Readout:
    """What the classifier reads: the first `prefix` of the prefix tokens, and whether image tokens. `cls`: these prefix
    tokens stand for the image, not the mean of the image tokens."""

    prefix: int
    image: bool
    cls: bool


def token_weights(tokens: int, num_prefix_tokens: int, readout: Readout, last: bool, like: Tensor) -> Tensor:
    """How much each token's error counts [tokens].

    Leaving the last block, what the classifier reads counts. Below, all do; where CLS stands for the image it counts as
    much as all image tokens, since attention reads the answer into it.

    Args:
        tokens: prefix and image tokens, P + N.
        num_prefix_tokens: P: CLS, distillation and register tokens.
        readout: of the model.
        last: whether the tokens leave the last block.
        like: a tensor on the device.
    """
    weights = torch.ones(tokens, device=like.device)
    if last:
        weights[readout.prefix : num_prefix_tokens] = 0
        weights[num_prefix_tokens:] = float(readout.image)
    if readout.cls and (readout.image or not last):
        weights[: readout.prefix] = max(1.0, (tokens - num_prefix_tokens) / readout.prefix)
    return weights
