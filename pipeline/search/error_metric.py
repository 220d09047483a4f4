"""What an error in the residual stream costs the classes: the metric in which structured OBS measures errors.

With classes drawn from what the model says (no labels), it is the second moments of the gradient of their
log-likelihood with respect to the stream, summed over tokens: Fisher information, as the output factor of K-FAC
(Martens and Grosse, 2015). To second order an error `e` costs a KL divergence of `e^T F e / 2`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lowpass.pipeline.base.progress import track
from lowpass.pipeline.method.structured_obs import BlockMetric
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT

METRIC_IMAGES = 512
IMAGES_AT_ONCE = 16  # a backward pass holds what every block made of them
DAMPING = 0.03  # of the mean, added to the diagonal: gradients of few images span few directions


def block_metrics(model: SlimViT, entering: Sequence[Tensor], seed: int) -> list[BlockMetric]:
    """The metrics of all blocks, from one pass forwards and one backwards.

    Args:
        model: in evaluation mode.
        entering: tokens [B, T, C] that enter its first block; the first `METRIC_IMAGES` images are used.
        seed: of the classes that are drawn.
    """
    parameter = next(model.parameters())
    draw = torch.Generator().manual_seed(seed)
    size = model.architecture.dense.embed_dim
    sums = torch.zeros(len(model.blocks), 2, size, size, dtype=torch.float64, device=parameter.device)
    for tokens in track(list(_chunks(entering)), "weighing errors"):
        stream = list[Tensor]()
        with torch.enable_grad():
            leaving = tokens.to(parameter.device).requires_grad_()
            for block in model.blocks:
                middle, leaving = _both(block, leaving)
                stream += (middle, leaving)
            logits = model.classify(leaving)
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draw)[:, 0]
            loss = F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
        for number, gradient in enumerate(torch.autograd.grad(loss, stream)):
            rows = model.stream.tokens(gradient).flatten(0, 1)
            sums[number // 2, number % 2] += rows.T @ rows
    return [BlockMetric(_root(middle), _root(leaving)) for middle, leaving in sums]


def _chunks(entering: Sequence[Tensor]) -> Iterator[Tensor]:
    left = METRIC_IMAGES
    for batch in entering:
        if not left:
            return  # no images would still be a chunk
        yield from batch[:left].split(IMAGES_AT_ONCE)
        left -= min(left, len(batch))


def _both(block: SlimBlock, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The stream behind attention, and behind the MLP."""
    middle, weights = block.mix(tokens)
    return middle, block.feed(block.select(middle, weights))


def _root(moments: Tensor) -> Tensor:
    """Of the damped metric, scaled to a mean diagonal of 1."""
    scaled = moments / moments.diagonal().mean().clamp_min(1e-300)
    scaled.diagonal().add_(DAMPING)
    values, vectors = torch.linalg.eigh(scaled)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
