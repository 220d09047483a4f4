"""What an error in the stream costs the classes, against the divergence that it really makes."""

import pytest
import torch
from conftest import MakeViT
from families import FAMILIES
from test_families import dense_of
from torch import Tensor
from torch.nn import functional as F

from lowpass.pipeline.data.datasets import made_batches
from lowpass.pipeline.data.digits import DigitScenes
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.error_metric import DAMPING, IMAGES_AT_ONCE, block_metrics

BLOCK = 3


@pytest.fixture(scope="module")
def entering(digits_slim: SlimViT) -> Tensor:
    scenes = DigitScenes("train")
    images = torch.stack([scenes[i][0] for i in range(256)])
    with torch.no_grad():
        return digits_slim.embed(images)


@torch.no_grad()
def divergence(slim: SlimViT, tokens: Tensor, direction: Tensor) -> float:
    """From an error of length 1 along `direction` [C], in every token with a sign of its own, behind `BLOCK`."""
    for block in slim.blocks[: BLOCK + 1]:
        tokens = block(tokens)
    signs = torch.randint(0, 2, tokens.shape[:2], generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    logits = []
    for stream in (tokens, tokens + signs[..., None] * direction):
        for block in slim.blocks[BLOCK + 1 :]:
            stream = block(stream)
        logits.append(slim.classify(stream).log_softmax(-1))
    return float(F.kl_div(logits[1], logits[0], reduction="batchmean", log_target=True))


def test_it_tells_which_errors_cost(digits_slim: SlimViT, entering: Tensor) -> None:
    """Along its largest axes an error costs many times what it costs along its smallest, in that order."""
    root = block_metrics(digits_slim, [entering], 0)[BLOCK].leaving
    vectors = torch.linalg.eigh(root).eigenvectors.float().T
    costs = [divergence(digits_slim, entering, vectors[axis]) for axis in (-1, len(vectors) // 2, 0)]
    assert costs[0] > 3 * costs[1] > 9 * costs[2]


def test_it_is_fisher_information(digits_slim: SlimViT, entering: Tensor) -> None:
    """Against all classes weighed by what the model says, where it draws one: the same but for the luck of the draw."""
    slim, tokens = digits_slim, entering
    expected = torch.zeros(96, 96, dtype=torch.float64)
    for chunk in tokens.split(64):
        for block in slim.blocks[: BLOCK + 1]:
            chunk = block(chunk)
        leaving = chunk.detach().requires_grad_()
        chunk = leaving
        for block in slim.blocks[BLOCK + 1 :]:
            chunk = block(chunk)
        log_p = slim.classify(chunk).log_softmax(-1)
        for label in range(10):
            (gradient,) = torch.autograd.grad(log_p[:, label].sum(), leaving, retain_graph=True)
            rows = gradient.double() * log_p[:, label].detach().exp().double().sqrt()[:, None, None]
            expected += rows.flatten(0, 1).T @ rows.flatten(0, 1)
    expected /= expected.diagonal().mean()
    root = block_metrics(slim, [tokens], 0)[BLOCK].leaving
    found = root @ root - DAMPING * torch.eye(96)
    # Drawn, the few images in doubt carry it all.
    assert float((found * expected).sum() / found.norm() / expected.norm()) > 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_one(family: str, make_vit: MakeViT) -> None:
    slim = SlimViT.from_timm(dense_of(family, make_vit))
    images = made_batches(slim.architecture, IMAGES_AT_ONCE + 4, 32, seed=3)[0][0]
    with torch.no_grad():
        tokens = slim.embed(images)
    metrics = block_metrics(slim, [tokens], 0)
    assert len(metrics) == len(slim.blocks)
    size = slim.architecture.dense.embed_dim
    for root in (part for metric in metrics for part in (metric.middle, metric.leaving)):
        assert root.shape == (size, size) and bool(root.isfinite().all())
        torch.testing.assert_close(root, root.T)
        assert float((root @ root).diagonal().mean()) == pytest.approx(1 + DAMPING)
    assert all(parameter.grad is None for parameter in slim.parameters())
