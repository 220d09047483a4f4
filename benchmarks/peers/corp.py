"""CORP (Zhang and Yang, arXiv 2602.05243): one-shot pruning of hidden and of query/key channels, made up for in closed
form; no labels, no gradients, no training.

From the paper's abstract, and from what its authors' code (github.com/BOX-LEO/CORP) does by default:

- the same share of every MLP's hidden channels and of every head's query/key channels goes; value channels stay;
- a hidden channel is worth `E[x^2] P(|x| > 0.01 RMS)`, the RMS over the layer;
- removed hidden channels are predicted from kept ones, `x_P ~ B x_S + c`, `B = C_PS (C_SS + ridge I)^-1` of the
  covariances and `c = m_P - B m_S`; folded, `W_S + W_P B` and `b + W_P c`;
- the logits `q_P^T k_P` are predicted as `q_S^T M k_S` from second moments `G`, summed over all tokens: the solution of
  `G^q_SS M G^k_SS + ridge M = G^q_SP G^k_PS`; the factors of `I + M = (R S^1/2) (S^1/2 T)` go into query and key;
- the ridge is 1e-3, or what oracle approximating shrinkage (Chen et al., 2010) asks for, if that is more;
- at least 8 query/key channels a head stay; layer by layer, statistics are of the model as it stands.

Assumed, or different: a query/key channel is worth `E[q^2] E[k^2]`, its share in the logits between independent tokens,
where the authors' code takes `E[q^2 k^2]` of the same token; a block's attention is pruned before the statistics of its
MLP are taken; the authors' code makes `I + M` symmetric before it is factorised, which no equation asks for and which
we leave out; by default it also divides logits by the root of the channels that are left, where ours keep the dense
model's scale, by which they were matched. The authors report sparsities of up to 0.7 of these channels.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowpass.benchmarks.peers.matching import check_channels, choice_of, share_text
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.method.channels import best_channels
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT

RIDGE = 1e-3
ACTIVE = 0.01  # of the layer's RMS
LEAST_QUERY_KEY = 8  # channels a head


@dataclass(frozen=True)
class Moments:
    """Of features [rows, k]: `mean` [k] and `second` moments [k, k], FP64, over `rows`."""

    mean: Tensor
    second: Tensor
    rows: int

    @property
    def covariance(self) -> Tensor:
        """[k, k]."""
        return self.second - torch.outer(self.mean, self.mean)

    def take(self, channels: list[int]) -> "Moments":
        """Of some features."""
        return Moments(self.mean[channels], self.second[channels][:, channels], self.rows)


@torch.no_grad()
def prune_by_corp(
    model: SlimViT,
    images: Iterable[Tensor],
    target_macs: float,
    ridge: float | None = None,
    compensate: bool = True,
) -> None:
    """Prune `model` in place, every block by the same share, so far that it takes no more than a share of its MACs.

    Args:
        model: in evaluation mode, nothing removed.
        images: batches [B, C, H, W] to calibrate on; labels are not asked for.
        target_macs: share of the model's MACs that may stay.
        ridge: of both regressions; None: the paper's.
        compensate: otherwise channels are only removed.

    Raises:
        InputError: the target is out of reach, or the model has what the equations do not hold for.
    """
    check_channels(model, "CORP")
    hidden, qk_dim = _widths(model.architecture, target_macs)
    device = next(model.parameters()).device
    entering = [model.embed(batch.to(device)) for batch in images]
    for block in track(model.blocks, "pruning by CORP"):
        _prune_attention(block, entering, qk_dim, ridge, compensate)
        entering = [block.mix(tokens)[0] for tokens in entering]
        _prune_mlp(block, entering, hidden, ridge, compensate)
        entering = [tokens + block.ls2(block.mlp(block.norm2(tokens))) for tokens in entering]


def _widths(architecture: Architecture, target_macs: float) -> tuple[int, int]:
    """Hidden and query/key channels that stay in every block: the least share that has to go, counted in thousandths
    of it, as the authors round."""
    shape, dense = architecture.blocks[0], architecture.macs()
    steps = 1000
    for step in range(steps):
        sparsity = step / steps
        hidden = shape.hidden - int(shape.hidden * sparsity)
        qk_dim = max(shape.qk_dim - int(shape.qk_dim * sparsity), min(LEAST_QUERY_KEY, shape.qk_dim))
        cut = tuple(block.model_copy(update={"hidden": hidden, "qk_dim": qk_dim}) for block in architecture.blocks)
        macs = architecture.model_copy(update={"blocks": cut}).macs()
        if macs <= target_macs * dense:
            return hidden, qk_dim
    raise InputError(
        f"{target_macs:g} of the MACs is out of reach of CORP on {architecture.dense.name}: with next to no hidden and "
        f"query/key channels the model takes {share_text(macs, dense)}"
    )


def _prune_mlp(block: SlimBlock, middle: Sequence[Tensor], hidden: int, ridge: float | None, compensate: bool) -> None:
    """Down to `hidden` channels; `middle` is what leaves the attention, [B, T, C] a batch."""
    first, second = block.mlp.fc1, block.mlp.fc2
    if hidden == first.out_features:
        return

    def seen() -> Iterator[Tensor]:  # twice, since all of it would not fit into memory
        for tokens in middle:
            yield block.mlp.act(first(block.norm2(tokens)))

    moments = moments_of(seen())
    energy = moments.second.diagonal()
    threshold = ACTIVE * energy.mean().sqrt()
    active = sum((part.abs() > threshold).double().sum((0, 1)) for part in seen()) / moments.rows
    kept = best_channels(energy * active, hidden)
    if compensate:
        gone = sorted(set(range(first.out_features)) - set(kept))
        slope, offset = predict(moments, list(kept), gone, ridge)
        weight = second.weight.double()
        weight[:, list(kept)] += weight[:, gone] @ slope
        second.bias.add_((weight[:, gone] @ offset).to(second.bias.dtype))
        second.weight.copy_(weight)
    remove_channels(block, choice_of(block, hidden=kept))


def predict(moments: Moments, kept: list[int], gone: list[int], ridge: float | None) -> tuple[Tensor, Tensor]:
    """`B` [gone, kept] and `c` [gone] of `x_P ~ B x_S + c`."""
    covariance = moments.covariance
    own = covariance[kept][:, kept]
    penalty = shrinkage(own, moments.rows) if ridge is None else ridge
    regular = own + penalty * torch.eye(len(kept), dtype=own.dtype, device=own.device)
    slope = torch.linalg.solve(regular, covariance[kept][:, gone]).T
    return slope, moments.mean[gone] - slope @ moments.mean[kept]


def _prune_attention(
    block: SlimBlock, entering: Sequence[Tensor], qk_dim: int, ridge: float | None, compensate: bool
) -> None:
    """Down to `qk_dim` query/key channels a head; `entering` is what enters the block, [B, T, C] a batch."""
    attention = block.attn
    heads, size = attention.num_heads, attention.qk_dim
    if qk_dim == size:
        return
    query_moments, key_moments = (
        moments_of(layer(block.norm1(tokens)) for tokens in entering) for layer in (attention.query, attention.key)
    )
    pairs = []
    for head in range(heads):
        own = list(range(head * size, (head + 1) * size))
        query, key = query_moments.take(own), key_moments.take(own)
        kept = list(best_channels(query.second.diagonal() * key.second.diagonal(), qk_dim))
        if compensate:
            left, right = match_logits(query, key, kept, ridge)
            rows = [own[channel] for channel in kept]
            _turn(attention.query, rows, left)
            _turn(attention.key, rows, right)
        pairs.append(kept)
    remove_channels(block, choice_of(block, pairs=pairs))


def match_logits(query: Moments, key: Moments, kept: list[int], ridge: float | None) -> tuple[Tensor, Tensor]:
    """What a head's kept queries and keys are multiplied by, each [kept, kept]: `I + M`, split evenly between them."""
    gone = sorted(set(range(len(query.mean))) - set(kept))
    wanted = query.second[kept][:, gone] @ key.second[gone][:, kept]
    # Both moments are symmetric: in their eigenvectors the equation falls apart into single numbers.
    (values_q, vectors_q), (values_k, vectors_k) = (
        torch.linalg.eigh(side.second[kept][:, kept]) for side in (query, key)
    )
    # The ridge is of sums over the tokens, on either side.
    penalty = shrinkage(query.covariance[kept][:, kept], query.rows) / query.rows**2 if ridge is None else ridge
    products = values_q.clamp_min(0)[:, None] * values_k.clamp_min(0)
    inner = vectors_q.T @ wanted @ vectors_k / (products + penalty)
    whole = vectors_q @ inner @ vectors_k.T + torch.eye(len(kept), dtype=wanted.dtype, device=wanted.device)
    left, singular, right = torch.linalg.svd(whole)
    root = singular.sqrt()
    return left * root, right.T * root


def _turn(layer: nn.Linear, rows: list[int], by: Tensor) -> None:
    """Multiply what `layer` gives in `rows` by `by` from the right, in place."""
    layer.weight[rows] = (by.T @ layer.weight[rows].double()).to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias[rows] = (layer.bias[rows].double() @ by).to(layer.bias.dtype)


def moments_of(batches: Iterable[Tensor]) -> Moments:
    """Of features [B, T, k], batch by batch."""
    total, products, rows = torch.zeros(()), torch.zeros(()), 0
    for batch in batches:
        values = batch.flatten(0, 1).double()
        total, products = total.to(values) + values.sum(0), products.to(values) + values.T @ values
        rows += len(values)
    return Moments(total / rows, products / rows, rows)


def shrinkage(covariance: Tensor, rows: int) -> float:
    """The paper's ridge for a covariance [k, k] of so many rows: oracle approximating shrinkage, at least `RIDGE`."""
    size = len(covariance)
    trace, square = float(covariance.trace()), float(covariance.square().sum())
    spread = (rows + 1 - 2 / size) * (square - trace**2 / size)
    amount = 1.0 if spread <= 0 else min(1.0, ((1 - 2 / size) * square + trace**2) / spread)
    return max(RIDGE, amount * trace / size)
