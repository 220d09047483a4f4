"""Recovery of thinned attention heads without training: queries and keys are refitted by the logits they must give.

With the queries given, the keys that come nearest to the dense logits are a least-squares solution, and the other way
round.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowpass.pipeline.method.recovery import Moments, Refit, Rows, moments

RIDGE = 1e-6  # of the mean square of a channel


@dataclass(frozen=True)
class QueryKey:
    """The query and key layers [H * d, C] of one attention, and H."""

    query: nn.Linear
    key: nn.Linear
    num_heads: int


def refit_query_key(
    pruned: QueryKey,
    inputs: Iterable[Tensor],
    dense: QueryKey,
    heads: tuple[int, ...],
    moments_of: Callable[[Iterable[Rows]], tuple[Moments, Moments]] = moments,
) -> Refit:
    """Refit thinned queries and keys, in place, so that their logits come near the dense heads'.

    Args:
        pruned: its head i was `heads[i]` of `dense`.
        inputs: what enters the attention, normalised [B, T, C].
        dense: before it was thinned.
        heads: see above.
        moments_of: `moments`, or what adds up those of several processes.
    """
    fitted, judged = moments_of((x, x[..., :1], torch.ones(x.shape[1], device=x.device)) for x in inputs)
    query, key = (_per_head(layer, pruned.num_heads) for layer in (pruned.query, pruned.key))
    wanted = [_per_head(layer, dense.num_heads)[list(heads)] for layer in (dense.query, dense.key)]
    before = _logit_error(query, key, wanted, judged.gram)
    new_key = _match(query, wanted[0], wanted[1], fitted.gram)
    new_query = _match(new_key, wanted[1], wanted[0], fitted.gram)
    after = _logit_error(new_query, new_key, wanted, judged.gram)
    if not after < before or pruned.query.bias is None:
        return Refit(layer="query/key", before=before, after=before, ridge=None)
    for layer, solution in ((pruned.query, new_query), (pruned.key, new_key)):
        rows = solution.flatten(0, 1)
        with torch.no_grad():
            layer.weight.copy_(rows[:, :-1])
            layer.bias.copy_(rows[:, -1])
    return Refit(layer="query/key", before=before, after=after, ridge=RIDGE)


def _per_head(layer: nn.Linear, heads: int) -> Tensor:
    """[H, d, C + 1], the bias last, FP64."""
    bias = torch.zeros(layer.out_features, device=layer.weight.device) if layer.bias is None else layer.bias
    return torch.cat([layer.weight, bias[:, None]], 1).detach().double().unflatten(0, (heads, -1))


def _match(given: Tensor, given_whole: Tensor, other_whole: Tensor, gram: Tensor) -> Tensor:
    """The other side [H, d, C + 1] for which `given^T other` comes nearest to `given_whole^T other_whole` over tokens
    with second moments `gram`: `(G S G^T)^-1 G S W^T V` for each head."""
    weighted = given @ gram
    square = weighted @ given.transpose(1, 2)
    ridge = RIDGE * square.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    square.diagonal(dim1=1, dim2=2).add_(ridge.clamp_min(torch.finfo(torch.float32).tiny))  # a dead head has none
    return torch.linalg.solve(square, weighted @ given_whole.transpose(1, 2) @ other_whole)


def _logit_error(query: Tensor, key: Tensor, wanted: list[Tensor], gram: Tensor) -> float:
    """Mean squared error of the logits between independent tokens with second moments `gram`."""
    root = torch.linalg.cholesky(gram / gram[-1, -1] + 1e-12 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram))
    now, then = ((q @ root).transpose(1, 2) @ (k @ root) for q, k in ((query, key), (wanted[0], wanted[1])))
    return float((now - then).square().sum() / len(query))
