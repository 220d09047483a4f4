"""Distillation on a model and a data set so small that an epoch takes a blink."""

import copy
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeViT
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import lowpass.pipeline.train.finetune
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.data.datasets import Data, load_data
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.train.finetune import finetune
from lowpass.pipeline.train.log import Epoch
from lowpass.pipeline.train.loss import distillation_loss, mixing
from lowpass.pipeline.train.settings import FinetuneSettings

COUNT, CLASSES = 24, 5


@pytest.fixture(scope="module")
def dense(make_vit: MakeViT) -> SlimViT:
    """To be copied, not changed."""
    return SlimViT.from_timm(make_vit(init_values=0.5))


@pytest.fixture(scope="module")
def slim(dense: SlimViT) -> SlimViT:
    """Thin and dropping tokens; to be copied, not changed."""
    model = copy.deepcopy(dense)
    model.set_keep(0, 9)
    remove_channels(model.blocks[0], ChannelChoice((0, 2), ((0, 1), (3, 5)), ((1,), (2,)), tuple(range(40))))
    return model


def images() -> Tensor:
    return torch.randn(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def labels(seed: int = 0) -> Tensor:
    return torch.randint(CLASSES, (COUNT,), generator=torch.Generator().manual_seed(seed))


def data(train: Dataset[Any] | None = None) -> Data:
    train = train or TensorDataset(images(), labels())
    return Data("made", train, train, train, tuple(map(str, range(CLASSES))), CLASSES)


def settings(**changes: float) -> FinetuneSettings:
    return FinetuneSettings.model_validate({"epochs": 1, "batch_size": 8, "lr": 0.05, "ema_decay": 0.5} | changes)


def tuned(slim: SlimViT, dense: SlimViT, to: Data | None = None, seed: int = 0, **changes: float) -> SlimViT:
    return finetune(copy.deepcopy(slim), copy.deepcopy(dense), to or data(), settings(**changes), seed)


def same_weights(one: SlimViT, two: SlimViT) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name].cpu(), second[name].cpu()) for name in first)


def test_the_same_seed_gives_the_same_weights(slim: SlimViT, dense: SlimViT) -> None:
    one = tuned(slim, dense, seed=3)
    torch.rand(7)  # whatever was drawn before
    assert same_weights(tuned(slim, dense, seed=3), one)
    assert not same_weights(tuned(slim, dense, seed=4), one)


def test_the_seed_draws_the_augmentation(tmp_path: Path, slim: SlimViT, dense: SlimViT) -> None:
    for i in range(2 * CLASSES):
        path = tmp_path / str(i % CLASSES) / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").rotate(20 * i).resize((24, 24)).save(path)
    folder = load_data(str(tmp_path), slim.architecture)
    one = tuned(slim, dense, folder, seed=3, batch_size=4)
    random.random()  # whatever was drawn before
    np.random.rand()
    assert same_weights(tuned(slim, dense, folder, seed=3, batch_size=4), one)


def test_what_comes_back(slim: SlimViT, dense: SlimViT) -> None:
    trained, teacher = copy.deepcopy(slim), copy.deepcopy(dense)
    result = finetune(trained, teacher, data(), settings(), seed=0)
    assert result.architecture == slim.architecture
    assert not any(module.training for module in result.modules())
    assert {parameter.device.type for parameter in result.parameters()} == {"cpu"}
    assert same_weights(teacher, dense)
    assert all(parameter.grad is None for parameter in (*trained.parameters(), *result.parameters()))
    for one, two in ((result, slim), (trained, slim), (result, trained)):  # trained in place, too, and averaged
        assert not same_weights(one, two)


def test_every_layer_is_trained(slim: SlimViT, dense: SlimViT) -> None:
    result = tuned(slim, dense)
    for (name, after), before in zip(result.named_parameters(), slim.parameters(), strict=True):
        # A key bias moves all logits of a query alike, which softmax does not see.
        assert name.endswith("attn.key.bias") or not torch.equal(after, before), name


def test_without_averaging_the_trained_weights_come_back(slim: SlimViT, dense: SlimViT) -> None:
    trained = copy.deepcopy(slim)
    result = finetune(trained, copy.deepcopy(dense), data(), settings(ema_decay=0), seed=0)
    assert same_weights(result, trained)


def test_training_fits_the_labels(slim: SlimViT, dense: SlimViT) -> None:
    def loss(model: SlimViT) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(images()), labels()))

    assert loss(tuned(slim, dense, epochs=10, distill_weight=0)) < 0.7 * loss(slim)


def test_the_distill_weight_shares_between_labels_and_teacher(slim: SlimViT, dense: SlimViT, make_vit: MakeViT) -> None:
    other_labels = data(TensorDataset(images(), labels(1)))
    other_teacher = SlimViT.from_timm(make_vit(init_values=0.5, seed=1))
    for weight, labels_matter, teacher_matters in ((0.0, True, False), (0.5, True, True), (1.0, False, True)):
        plain = tuned(slim, dense, distill_weight=weight)
        assert same_weights(tuned(slim, dense, other_labels, distill_weight=weight), plain) != labels_matter
        assert same_weights(tuned(slim, other_teacher, distill_weight=weight), plain) != teacher_matters


def test_the_teacher_s_answer_is_hard(slim: SlimViT, dense: SlimViT) -> None:
    """Its most likely class, however sure it is of it."""
    surer = copy.deepcopy(dense)
    with torch.no_grad():
        surer.vit.head.weight.mul_(3)
        surer.vit.head.bias.mul_(3)
    assert same_weights(tuned(slim, surer, distill_weight=1), tuned(slim, dense, distill_weight=1))


def test_layer_decay_slows_the_bottom(slim: SlimViT, dense: SlimViT) -> None:
    def moved(decay: float, name: str) -> float:
        result = tuned(slim, dense, layer_decay=decay, weight_decay=0)
        return float((result.get_parameter(name) - slim.get_parameter(name)).detach().abs().max())

    bottom, top = "vit.patch_embed.proj.weight", "vit.head.weight"
    assert moved(0.01, bottom) < 0.01 * moved(1, bottom)
    assert moved(0.01, top) > 0.1 * moved(1, top)


def test_weight_decay_shrinks_matrices_but_not_gains(slim: SlimViT, dense: SlimViT) -> None:
    plain = tuned(slim, dense, weight_decay=0, epochs=2)
    shrunk = tuned(slim, dense, weight_decay=50, epochs=2)
    matrix, gain = "vit.blocks.1.mlp.fc1.weight", "vit.blocks.1.norm1.weight"
    assert shrunk.get_parameter(matrix).norm() < 0.95 * plain.get_parameter(matrix).norm()
    assert shrunk.get_parameter(gain).norm() > 0.98 * plain.get_parameter(gain).norm()


def test_the_rate_is_for_512_images(slim: SlimViT, dense: SlimViT) -> None:
    """AdamW's first step moves a weight by the learning rate."""
    for size in (COUNT, COUNT - 4):
        result = tuned(slim, dense, batch_size=size, lr=0.5, layer_decay=1, weight_decay=0, ema_decay=0)
        moved = (result.vit.head.weight - slim.vit.head.weight).detach().abs()
        assert float(moved.max()) == pytest.approx(0.5 * size / 512, rel=1e-3)


def test_large_gradients_are_clipped(slim: SlimViT, dense: SlimViT, monkeypatch: pytest.MonkeyPatch) -> None:
    clipped = tuned(slim, dense)
    monkeypatch.setattr(lowpass.pipeline.train.finetune, "CLIP", 1e9)
    assert not same_weights(tuned(slim, dense), clipped)


class Scenes(Dataset[tuple[Tensor, int]]):
    """Remembers the epochs in which it was drawn from."""

    def __init__(self) -> None:
        self.epoch = 0
        self.drawn: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.drawn.append((self.epoch, index))
        return images()[index], int(labels()[index])


def test_every_epoch_draws_new_scenes_in_a_new_order(slim: SlimViT, dense: SlimViT) -> None:
    scenes = Scenes()
    tuned(slim, dense, data(scenes), epochs=2)
    first, second = ([index for epoch, index in scenes.drawn if epoch == e] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert len({tuple(first), tuple(second), tuple(range(COUNT))}) == 3


@pytest.mark.parametrize("poison", [float("nan"), 3e38])  # the sum of a few losses of 3e38 is infinite
def test_a_loss_that_is_not_finite_stops_the_run(poison: float, slim: SlimViT, dense: SlimViT) -> None:
    broken = copy.deepcopy(slim)
    with torch.no_grad():
        broken.vit.head.bias[0] = poison
    with pytest.raises(RunError, match=r"the fine-tuning loss became (nan|inf) in epoch 0; lower --lr"):
        tuned(broken, dense)


def test_a_batch_of_all_images_is_the_largest(slim: SlimViT, dense: SlimViT, caplog: pytest.LogCaptureFixture) -> None:
    assert not same_weights(tuned(slim, dense, batch_size=COUNT, epochs=2), slim)
    with caplog.at_level(logging.INFO, "lowpass"):
        clamped = tuned(slim, dense, batch_size=COUNT + 1, epochs=2)
    assert f"a batch of {COUNT + 1} is more than the {COUNT} training images" in caplog.text
    assert same_weights(clamped, tuned(slim, dense, batch_size=COUNT, epochs=2))


def test_gradients_of_several_batches_are_those_of_one(slim: SlimViT, dense: SlimViT) -> None:
    one = tuned(slim, dense, batch_size=8, epochs=2, lr=0.01)
    several = tuned(slim, dense, batch_size=4, effective_batch=8, epochs=2, lr=0.01)
    assert not same_weights(tuned(slim, dense, batch_size=4, epochs=2, lr=0.01), one)
    for first, second in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=2e-3, rtol=1e-2)  # the schedule counts batches
    with pytest.raises(InputError, match="--effective-batch 12 is no multiple of 8, 8 images in each of 1 processes"):
        tuned(slim, dense, batch_size=8, effective_batch=12)


def test_the_best_epoch_is_kept(slim: SlimViT, dense: SlimViT) -> None:
    """Of what was measured, whatever comes after."""
    seen: list[SlimViT] = []

    def measure(model: SlimViT) -> float:
        seen.append(copy.deepcopy(model))
        return [50.0, 70.0, 70.0][len(seen) - 1]

    told: list[Epoch] = []
    arguments = (copy.deepcopy(slim), copy.deepcopy(dense), data(), settings(epochs=6, keep_best=2), 0)
    best = finetune(*arguments, on_epoch=told.append, measure=measure)
    assert same_weights(best, seen[1]) and not same_weights(best, seen[2])
    assert [epoch.top1 for epoch in told] == [None, 50.0, None, 70.0, None, 70.0]
    assert same_weights(tuned(slim, dense, epochs=6), seen[2])  # measuring changes nothing


def test_images_are_mixed_by_place(slim: SlimViT, dense: SlimViT) -> None:
    plain = tuned(slim, dense)
    for change in ({"mixup": 0.8}, {"cutmix": 1.0}, {"smoothing": 0.1}):
        mixed = tuned(slim, dense, **change)
        assert not same_weights(mixed, plain)
        np.random.rand()  # whatever was drawn before
        assert same_weights(tuned(slim, dense, **change), mixed)
    assert not same_weights(tuned(slim, dense, mixup=0.8, batch_size=1), plain)  # nothing to mix with


def test_mixed_labels_are_shares() -> None:
    mix = mixing(settings(mixup=0.8, smoothing=0.1), CLASSES)
    assert mix is not None
    mixed, shares = mix(images(), labels(), (0, 1, 2))
    assert shares.shape == (COUNT, CLASSES)
    torch.testing.assert_close(shares.sum(1), torch.ones(COUNT))
    share = (mixed[0] - images()[-1]).norm() / (images()[0] - images()[-1]).norm()
    expected = share * smooth(labels()[0]) + (1 - share) * smooth(labels()[-1])
    torch.testing.assert_close(shares[0], expected, atol=1e-4, rtol=0)
    logits = torch.randn(COUNT, CLASSES)
    whole = distillation_loss(logits, shares, labels(1), 0.25, 0.1)
    parts = 0.75 * -(shares * logits.log_softmax(1)).sum(1).mean() + 0.25 * F.cross_entropy(logits, labels(1))
    torch.testing.assert_close(whole, parts)


def smooth(label: Tensor) -> Tensor:
    return 0.1 / CLASSES + 0.9 * F.one_hot(label, CLASSES)
