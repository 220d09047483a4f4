"""What an error in the residual stream costs the classes: the metric in which structured OBS measures errors.

With classes drawn from what the model says (no labels), it is the second moments of the gradient of their
log-likelihood with respect to the stream, summed over tokens: Fisher information, as the output factor of K-FAC
(Martens and Grosse, 2015). To second order an error `e` costs a KL divergence of `e^T F e / 2`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lowpass.pipeline.base.processes import Share
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.method.recovery import AddUp, alone
from lowpass.pipeline.method.structured_obs import BlockMetric
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT

METRIC_IMAGES = 512
IMAGES_AT_ONCE = 16  # a backward pass holds what every block made of them
DAMPING = 0.03  # of the mean, added to the diagonal: gradients of few images span few directions


def block_metrics(
    model: SlimViT, entering: Sequence[Tensor], seed: int, share: Share | None = None, add_up: AddUp = alone
) -> list[BlockMetric]:
    """The metrics of all blocks, from one pass forwards and one backwards.

    Args:
        model: in evaluation mode.
        entering: tokens [B, T, C] that enter its first block; the first `METRIC_IMAGES` images are used.
        seed: of the classes that are drawn.
        share: which of the batches these are, where several processes have some each; None: all of them.
        add_up: adds up what several processes found.
    """
    parameter, dense = next(model.parameters()), model.architecture.dense
    size, share = dense.embed_dim, share or Share(tuple(map(len, entering)))
    sums = torch.zeros(len(model.blocks), 2, size, size, dtype=torch.float64, device=parameter.device)
    chunks = list(_chunks(entering, share, dense.num_classes, torch.Generator().manual_seed(seed)))
    for tokens, noise in track(chunks, "weighing errors"):
        stream = list[Tensor]()
        with torch.enable_grad():
            leaving = tokens.to(parameter.device).requires_grad_()
            for block in model.blocks:
                middle, leaving = _both(block, leaving)
                stream += (middle, leaving)
            logits = model.classify(leaving)
            drawn = (logits.detach().softmax(-1).cpu() / noise).argmax(-1)  # each class as often as it is likely
            loss = F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
        for number, gradient in enumerate(torch.autograd.grad(loss, stream)):
            rows = model.stream.tokens(gradient).flatten(0, 1)
            sums[number // 2, number % 2] += rows.T @ rows
    found = add_up((sums,))
    assert found is not None  # zeros, where there are no images
    return [BlockMetric(_root(middle), _root(leaving)) for middle, leaving in found[0]]


def _chunks(
    entering: Sequence[Tensor], share: Share, classes: int, draw: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens of a few images, and exponential noise [B, classes] by which their classes are drawn: the same for an
    image whichever process has it."""
    noises, left = list[list[Tensor]](), METRIC_IMAGES
    for length in share.lengths:
        used = min(length, left)
        sizes = [min(IMAGES_AT_ONCE, used - before) for before in range(0, used, IMAGES_AT_ONCE)]
        noises.append([torch.empty(size, classes).exponential_(generator=draw) for size in sizes])
        left -= used
    for batch, own in zip(entering, share.of(noises), strict=True):
        for tokens, noise in zip(batch.split(IMAGES_AT_ONCE), own, strict=False):
            yield tokens[: len(noise)], noise


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
