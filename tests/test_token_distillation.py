"""The slim model's last tokens are compared with the same tokens of the dense model, and drawn towards them."""

import copy
import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import MakeViT
from hypothesis import given
from hypothesis import strategies as st
from ranks import together
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import TensorDataset

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.data.datasets import Data, load_data, subset
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.method.token_scores import kept_indices
from lowpass.pipeline.model.removal import remove_channels
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.finetune import finetune_run
from lowpass.pipeline.run.teacher import teacher_files
from lowpass.pipeline.train.finetune import finetune
from lowpass.pipeline.train.log import Epoch
from lowpass.pipeline.train.settings import FinetuneSettings
from lowpass.pipeline.train.tokens import distances, last_tokens, token_distance

COUNT, CLASSES = 24, 5
RUN = {"epochs": 2, "batch_size": 64, "lr": 4e-3, "token_distillation": 0.5}


def images() -> Tensor:
    return torch.randn(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def data() -> Data:
    labels = torch.randint(CLASSES, (COUNT,), generator=torch.Generator().manual_seed(0))
    train: Any = TensorDataset(images(), labels)
    return Data("made", train, train, train, tuple(map(str, range(CLASSES))), CLASSES)


@pytest.fixture(scope="module", params=[0, 2, None], ids=["CLS", "CLS and registers", "rotary"])
def dense(make_vit: MakeViT, request: pytest.FixtureRequest) -> SlimViT:
    """To be copied, not changed."""
    if request.param is not None:
        return SlimViT.from_timm(make_vit(init_values=0.5, reg_tokens=request.param, depth=3))
    torch.manual_seed(0)
    like_the_others = {"img_size": 16, "embed_dim": 24, "num_classes": CLASSES, "init_values": 0.5}
    model = timm.create_model("tiny_dinov3", **like_the_others)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return SlimViT.from_timm(model.eval())


@pytest.fixture(scope="module")
def slim(dense: SlimViT) -> SlimViT:
    """Thin, and dropping tokens in two of its blocks; to be copied, not changed."""
    model = copy.deepcopy(dense)
    model.set_keep(0, 11)
    model.set_keep(2, 6)
    remove_channels(model.blocks[0], ChannelChoice((0, 2), ((0, 4), (3, 7)), ((1,), (2,)), tuple(range(40))))
    return model


def apart(student: SlimViT, dense: SlimViT) -> float:
    with torch.no_grad(), distances(student, dense) as distance:
        student(images())
        dense(images())
        return float(distance())


def tuned(slim: SlimViT, dense: SlimViT, **changes: Any) -> tuple[SlimViT, list[Epoch]]:
    settings = FinetuneSettings.model_validate({"epochs": 1, "batch_size": 8, "lr": 0.05, "ema_decay": 0.5} | changes)
    told: list[Epoch] = []
    return finetune(copy.deepcopy(slim), copy.deepcopy(dense), data(), settings, 0, on_epoch=told.append), told


def test_a_model_that_lost_nothing_is_where_the_dense_one_is(dense: SlimViT) -> None:
    assert apart(copy.deepcopy(dense), dense) == 0


def without_effect(model: SlimViT) -> SlimViT:
    """Blocks that add nothing to the tokens, but choose among them."""
    still = copy.deepcopy(model)
    with torch.no_grad():
        for block in still.blocks:
            block.ls1.gamma.zero_()  # type: ignore[union-attr]
            block.ls2.gamma.zero_()  # type: ignore[union-attr]
    return still


def test_each_token_is_compared_with_itself(slim: SlimViT, dense: SlimViT) -> None:
    """Where blocks add nothing, what is left of the tokens is the dense model's to the bit, in its places alone."""
    ours, theirs = without_effect(slim), without_effect(dense)
    assert apart(ours, theirs) == 0
    with torch.no_grad(), last_tokens(ours) as left, last_tokens(theirs) as whole:
        ours(images())
        theirs(images())
        prefix = dense.blocks[0].num_prefix_tokens
        assert left.tokens.shape == (COUNT, prefix + 6, 24) and left.places.shape == (COUNT, prefix + 6, 1)
        assert torch.equal(left.places[:, :prefix, 0], torch.arange(prefix).expand(COUNT, -1))
        assert len({tuple(places) for places in left.places[..., 0].tolist()}) > 1  # each image has its own
        for wrong in (left.places.roll(1, 0), left.places.roll(1, 1), left.places.clamp(max=prefix)):
            assert token_distance(left.tokens, wrong, whole.tokens) > 0.01


def test_places_go_the_way_of_the_tokens(slim: SlimViT) -> None:
    """Followed block by block, by another path."""
    with torch.no_grad(), last_tokens(slim) as noted:
        logits = slim(images())
    with torch.no_grad():
        tokens, prefix = slim.embed(images()), slim.blocks[0].num_prefix_tokens
        places = torch.arange(16).expand(COUNT, -1)
        for block in slim.blocks:
            middle, weights = block.mix(tokens)
            if block.scores_tokens:
                places = places.gather(1, kept_indices(block.scores(middle, weights), block.keep))
            tokens = block(tokens)
        assert torch.equal(noted.places[:, prefix:, 0], places + prefix)
        torch.testing.assert_close(
            slim.vit.forward_head(slim.vit.norm(noted.tokens)), logits
        )  # as they are before the last norm


def test_nothing_is_left_of_it(slim: SlimViT, dense: SlimViT) -> None:
    model = copy.deepcopy(slim)
    selections = [block.keep_tokens for block in model.blocks]
    with last_tokens(model) as noted:
        model(images())
        before = noted.tokens
    model(images()[:3])
    assert noted.tokens is before and [block.keep_tokens for block in model.blocks] == selections
    average = tuned(slim, dense, token_distillation=1.0)[0]
    assert not average.vit.blocks._forward_hooks and not average.vit.blocks._forward_pre_hooks
    assert [block.keep_tokens for block in average.blocks] == selections


@given(st.floats(1e-3, 1e3), st.integers(1, 5))
def test_the_distance_is_relative_and_a_mean_over_images(scale: float, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    dense = scale * torch.randn(count, 9, 4, generator=generator)
    places = torch.stack([torch.randperm(9, generator=generator)[:5] for _ in range(count)])[..., None]
    there = torch.stack([dense[image, places[image, :, 0]] for image in range(count)])
    off = 0.1 * torch.randn(there.shape, generator=generator) * torch.arange(1, count + 1)[:, None, None]
    got = token_distance(there + scale * off, places, dense)
    one_by_one = [(scale * off[i]).square().sum() / there[i].square().sum() for i in range(count)]
    torch.testing.assert_close(got, torch.stack(one_by_one).mean(), rtol=1e-3, atol=1e-9)
    assert token_distance(there, places, dense) == 0
    assert float(token_distance(0 * there, places, dense)) == pytest.approx(1)


def test_its_gradient_brings_tokens_nearer(slim: SlimViT, dense: SlimViT) -> None:
    before, settings = apart(slim, dense), {"epochs": 20, "lr": 0.1, "distill_weight": 0.0, "layer_decay": 1.0}
    plain, _ = tuned(slim, dense, **settings)
    drawn, told = tuned(slim, dense, **settings, token_distillation=100.0)
    assert before > 0.01
    assert apart(drawn, dense) < 0.7 * before < apart(plain, dense)
    assert told[-1].token_distance is not None and told[0].token_distance is not None
    assert told[-1].token_distance < told[0].token_distance


def test_the_weight_is_of_the_loss(slim: SlimViT, dense: SlimViT) -> None:
    """A step whose rate is next to nothing shows the loss of the model as it was."""
    still = {"lr": 1e-12, "batch_size": COUNT, "weight_decay": 0.0}
    (_, [plain]), (_, [drawn]) = tuned(slim, dense, **still), tuned(slim, dense, **still, token_distillation=2.0)
    assert plain.token_distance is None
    assert drawn.token_distance == pytest.approx(apart(slim, dense), rel=1e-4)
    assert drawn.loss - plain.loss == pytest.approx(2 * apart(slim, dense), rel=1e-3)


def test_both_see_the_images_as_they_are_mixed(slim: SlimViT, dense: SlimViT) -> None:
    still = {"lr": 1e-12, "weight_decay": 0.0, "token_distillation": 1.0}
    for mixed in ({"mixup": 0.8}, {"cutmix": 1.0}):
        (_, [epoch]) = tuned(dense, dense, **still, **mixed)
        assert epoch.token_distance == pytest.approx(0, abs=1e-6)
        (_, [epoch]) = tuned(slim, dense, **still, **mixed)
        assert epoch.token_distance is not None and epoch.token_distance > 0.01


def test_in_mixed_precision(slim: SlimViT, dense: SlimViT) -> None:
    exact, half = (tuned(slim, dense, token_distillation=1.0, mixed_precision=p)[1][0] for p in ("no", "bf16"))
    assert half.token_distance == pytest.approx(exact.token_distance, rel=0.05) and half != exact


@pytest.mark.parametrize(("half", "within"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_hardly_changes_it_or_its_gradient(
    half: torch.dtype, within: float, slim: SlimViT, dense: SlimViT
) -> None:
    """As the loop runs them on a GPU: both models in mixed precision, in FP16 the loss scaled."""

    def found(mixed: bool) -> tuple[float, Tensor]:
        student, scale = copy.deepcopy(slim), 2.0**16
        with distances(student, dense) as distance, torch.autocast("cpu", half, enabled=mixed):
            student(images())
            with torch.no_grad():
                dense(images())
            apart = distance()
        assert apart.dtype == torch.float32
        (scale * apart).backward()
        gradients = [weight.grad.flatten() for weight in student.parameters() if weight.grad is not None]
        return float(apart.detach()), torch.cat(gradients) / scale

    (exact, gradient), (rough, its) = found(False), found(True)
    assert rough == pytest.approx(exact, rel=within) and rough != exact
    assert bool(its.isfinite().all())
    assert float((its - gradient).norm() / gradient.norm()) < 4 * within


def test_large_tokens_do_not_overflow() -> None:
    """Their squares are none that FP16 has."""
    tokens = 1000 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    places = torch.arange(5).expand(2, -1)[..., None]
    exact = token_distance(0.9 * tokens, places, tokens)
    assert float(exact) == pytest.approx(0.01, rel=1e-3)
    assert float(token_distance((0.9 * tokens).half(), places, tokens.half())) == pytest.approx(0.01, rel=0.02)


def test_fp16_without_a_gpu_is_refused(
    slim: SlimViT, dense: SlimViT, slim_run: Path, tmp_path: Path, few: "Images", monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be FP32 in silence."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="fp16 takes a GPU, and there is none: give bf16 or no"):
        tuned(slim, dense, mixed_precision="fp16")
    run = copied(slim_run, tmp_path / "run")
    with pytest.raises(InputError, match="fp16 takes a GPU"):
        finetune_run(run, few, RUN | {"mixed_precision": "fp16"}, None)
    assert not (run / "training").exists()


def together_tuned(slim: SlimViT, dense: SlimViT, changes: dict[str, Any]) -> tuple[dict[str, Tensor], list[Epoch]]:
    model, told = tuned(slim, dense, **changes)
    return model.state_dict(), told


@pytest.mark.parametrize(("precision", "within", "weights_within"), [("no", 1e-5, 2e-3), ("bf16", 0.02, 0.1)])
def test_two_processes_draw_as_one_of_twice_the_batch(
    precision: str, within: float, weights_within: float, slim: SlimViT, dense: SlimViT
) -> None:
    asked = {"epochs": 3, "lr": 0.2, "token_distillation": 2.0, "mixed_precision": precision}
    weights, epochs = together_tuned(slim, dense, asked | {"batch_size": 12})
    (shared, its), (same, nothing) = together(together_tuned, slim, dense, asked | {"batch_size": 6})
    assert nothing == []  # the first tells
    assert all(torch.equal(tensor, same[name]) for name, tensor in shared.items())
    for one, two in zip(epochs, its, strict=True):
        assert (two.loss, two.token_distance) == pytest.approx((one.loss, one.token_distance), rel=within)
    before = slim.state_dict()
    moved, apart = (
        sum(float((tensor - other[name]).square().sum()) for name, tensor in weights.items())
        for other in (before, shared)
    )
    assert moved > 0.5 and math.sqrt(apart / moved) < weights_within  # biases of keys move by rounding alone


def test_only_a_dense_model_has_them_all(slim: SlimViT, dense: SlimViT) -> None:
    with pytest.raises(ValueError, match="a model that keeps them all"), distances(slim, slim):
        pass
    with pytest.raises(ValueError, match="the dense model alone"):
        finetune(slim, torch.nn.Identity(), data(), FinetuneSettings(token_distillation=1.0), 0)
    with pytest.raises(ValueError, match="distillation needs a teacher"):
        finetune(slim, None, data(), FinetuneSettings(token_distillation=1.0, distill_weight=0), 0)


Images = tuple[Any, Any]


@pytest.fixture(scope="module")
def few(slim_run: Path) -> Images:
    """Of the digits, to train and to test on."""
    digits = load_data("digits", SlimViT.load(slim_run).architecture)
    return subset(digits.train, range(256)), subset(digits.test, range(100))


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def told(run: Path) -> list[str]:
    with (run / "training.csv").open() as file:
        return [row["token_distance"] for row in csv.DictReader(file)]


def broken_off(run: Path, few: Images, after: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training that ends so many steps in, saved after each."""
    steps, backward = [], torch.Tensor.backward

    def breaking(self: Tensor, *arguments: Any, **others: Any) -> None:
        steps.append(1)
        if len(steps) > after:
            raise KeyboardInterrupt
        backward(self, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", breaking)
        with pytest.raises(KeyboardInterrupt):
            finetune_run(run, few, changes, None, save_minutes=0)
    return run


def test_a_run_that_goes_on_ends_with_the_same_bytes(
    slim_run: Path, tmp_path: Path, few: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, plain = copied(slim_run, tmp_path / "whole"), copied(slim_run, tmp_path / "plain")
    finetune_run(whole, few, RUN, None)
    finetune_run(plain, few, RUN | {"token_distillation": 0.0}, None)
    broken = broken_off(copied(slim_run, tmp_path / "broken"), few, 6, RUN, monkeypatch)
    asked = json.loads((broken / "training" / "begun.json").read_text())
    assert asked["settings"]["token_distillation"] == 0.5
    with pytest.raises(InputError, match=r"has token_distillation = 0\.5, now it is 0\.1; leave it as it was"):
        finetune_run(broken, few, {"token_distillation": 0.1}, None, resume=True)
    finetune_run(broken, few, {}, None, resume=True)
    for name in ("slim.safetensors", "metrics.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert (plain / "slim.safetensors").read_bytes() != (whole / "slim.safetensors").read_bytes()
    assert told(plain) == ["", ""]
    assert [float(distance) for distance in told(broken)] == pytest.approx([float(one) for one in told(whole)])
    assert 0 < float(told(whole)[1]) < float(told(whole)[0])


def test_it_alone_is_enough_of_a_teacher(slim_run: Path, tmp_path: Path, few: Images) -> None:
    run = copied(slim_run, tmp_path / "run")
    finetune_run(run, few, RUN | {"distill_weight": 0.0}, None)
    assert float(told(run)[0]) > 0


def test_what_has_no_tokens_of_the_dense_model_is_refused(slim_run: Path, tmp_path: Path, few: Images) -> None:
    run = copied(slim_run, tmp_path / "run")
    with pytest.raises(InputError, match=r"token_distillation 0\.5 is of the dense .* teacher digits_deit has others"):
        finetune_run(run, few, RUN | {"teacher": "digits_deit"}, None)
    for weight in (-1.0, float("inf")):
        with pytest.raises(InputError, match="token_distillation"):
            finetune_run(run, few, {"token_distillation": weight}, None)
    (run / DENSE_WEIGHTS_FILE).unlink()
    with pytest.raises(InputError, match="has no dense model to distil"):
        finetune_run(run, few, RUN, None)
    assert (run / "slim.safetensors").read_bytes() == (slim_run / "slim.safetensors").read_bytes()
    assert not (run / "training").exists()


@pytest.mark.slow
def test_another_teacher_s_file_replaced_is_noticed(
    slim_run: Path, tmp_path: Path, few: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a kill and --resume, and the dense model's likewise."""
    file = tmp_path / "teacher.safetensors"
    state = {name: tensor.contiguous() for name, tensor in load_model("digits_deit").state_dict().items()}
    save_file(state, file)
    named = {"teacher": "digits_deit", "teacher_weights": file, "epochs": 2, "batch_size": 64}
    run = broken_off(copied(slim_run, tmp_path / "run"), few, 6, named, monkeypatch)
    own = broken_off(copied(slim_run, tmp_path / "own"), few, 6, {"epochs": 2, "batch_size": 64}, monkeypatch)
    original, dense = file.read_bytes(), (own / DENSE_WEIGHTS_FILE).read_bytes()
    save_file(state | {"head.bias": state["head.bias"] + 0.01}, file)
    said = (
        rf"whose file {file} was SHA-256 [0-9a-f]{{16}}\.\.\., now it is SHA-256 [0-9a-f]{{16}}\.\.\.; put it back as "
        "it was, or --restart"
    )
    with pytest.raises(InputError, match=said):
        finetune_run(run, few, {}, None, resume=True)
    file.unlink()
    with pytest.raises(InputError, match="now it is not there; put it back"):
        finetune_run(run, few, {}, None, resume=True)
    file.write_bytes(original)
    finetune_run(run, few, {}, None, resume=True)
    other = SlimViT.load(own, DENSE_WEIGHTS_FILE)
    with torch.no_grad():
        other.vit.head.bias.add_(0.01)
    other.save(own, DENSE_WEIGHTS_FILE)
    with pytest.raises(InputError, match=r"whose file dense\.safetensors was SHA-256"):
        finetune_run(own, few, {}, None, resume=True)
    (own / DENSE_WEIGHTS_FILE).write_bytes(dense)
    moved = own.rename(tmp_path / "moved")
    finetune_run(moved, few, {}, None, resume=True)


def test_a_teacher_s_folder_is_watched(slim_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "training_args.bin"):
        (folder / name).write_text(name)
    settings = FinetuneSettings(teacher=str(folder))
    assert sorted(teacher_files(slim_run, settings)) == [str(folder / n) for n in ("config.json", "model.safetensors")]
    assert teacher_files(slim_run, FinetuneSettings(teacher="digits_deit")) == {}
    assert teacher_files(slim_run, FinetuneSettings(distill_weight=0)) == {}
