"""LFS against its definition, differentiated in one piece through the whole model."""

import copy

import pytest
import torch
from conftest import MakeViT
from torch import Tensor
from torch.nn import functional as F

from lowpass.pipeline.data.datasets import Batches, made_batches
from lowpass.pipeline.method.frequency import lowpass_images
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.channel_criteria import low_frequency_sensitivity


@pytest.fixture
def slim(make_vit: MakeViT) -> SlimViT:
    """Its blocks drop tokens: the model as it stands in the middle of a search."""
    model = SlimViT.from_timm(make_vit(depth=3))
    model.set_keep(0, 13)
    model.set_keep(2, 6)
    return model


@pytest.fixture
def batches(slim: SlimViT) -> Batches:
    return made_batches(slim.architecture, 10, 4, seed=0)


def naive(slim: SlimViT, batches: Batches, block: int, cutoff: float, weight: float) -> ChannelScores:
    """The gradient of the mean loss over batches, from `backward` on a copy of everything."""
    model = copy.deepcopy(slim)
    left: list[Tensor] = []
    model.vit.blocks[block].register_forward_hook(lambda _module, _inputs, output: left.append(output[:, 0]))
    for images, labels in batches:
        left.clear()
        with torch.no_grad():
            model(images)
        logits = model(lowpass_images(images, cutoff))
        target, low = left[0].softmax(-1), left[1].softmax(-1)
        divergence = (target * (target.log() - low.log())).sum() / target.numel()
        loss = weight * F.cross_entropy(logits, labels) + (1 - weight) * divergence
        (loss / len(batches)).backward()
    attention, mlp = model.blocks[block].attn, model.blocks[block].mlp
    layers = (attention.query, attention.key, attention.value, mlp.fc1)
    query, key, value, hidden = ((layer.weight.grad * layer.weight.detach()).pow(2).sum(1) for layer in layers)
    return ChannelScores((query + key).view(3, 8), value.view(3, 8), hidden)


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize(("cutoff", "weight"), [(0.1, 0.1), (0.4, 1.0), (0.4, 0.0)])
def test_equals_its_definition(block: int, cutoff: float, weight: float, slim: SlimViT, batches: Batches) -> None:
    expected = naive(slim, batches, block, cutoff, weight)
    scores = low_frequency_sensitivity(slim, batches, block, cutoff, weight)
    for field in ("query_key", "value", "hidden"):
        torch.testing.assert_close(getattr(scores, field), getattr(expected, field), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool, slim: SlimViT, batches: Batches) -> None:
    slim.train(training)
    before = copy.deepcopy(slim.state_dict())
    low_frequency_sensitivity(slim, batches, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in slim.state_dict().items())
    assert all(parameter.grad is None for parameter in slim.parameters())
    assert all(module.training == training for module in slim.modules())


def test_a_dense_timm_model_will_do(make_vit: MakeViT) -> None:
    dense = make_vit()
    batches = made_batches(SlimViT.from_timm(dense).architecture, 4, 4, seed=0)
    plain = low_frequency_sensitivity(dense, batches, 0)
    slim = low_frequency_sensitivity(SlimViT.from_timm(dense), batches, 0)
    assert torch.equal(plain.query_key, slim.query_key)
    assert torch.equal(plain.hidden, slim.hidden)


def test_no_batches_are_refused(slim: SlimViT) -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        low_frequency_sensitivity(slim, [], 0)
