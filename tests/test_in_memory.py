"""Models and data sets that a program holds: taken as they compute, or refused in a sentence."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import tiny  # noqa: F401 - registers the models of these tests
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import Dataset

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.run.inputs import read_inputs
from lowpass.pipeline.run.recipe import IN_MEMORY, make_recipe


def made() -> Any:
    torch.manual_seed(0)
    return timm.create_model("tiny_deit").eval()


class Items(Dataset[Any]):
    """Four images of noise with labels, or whatever is made of them."""

    def __init__(self, change: Callable[[Tensor, int], Any] = lambda image, label: (image, label)) -> None:
        self.change = change

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.change(torch.full((3, 32, 32), index / 4), index)


def read(model: nn.Module, items: Items | None = None) -> Any:
    recipe = make_recipe(model=IN_MEMORY, data=IN_MEMORY, target_macs=0.6)
    items = items or Items()
    return read_inputs(recipe, model, (items, items))


def _with_dropout(model: Any) -> Any:
    model.head = nn.Sequential(nn.Dropout(0.5), model.head)
    return model


TAKEN: dict[str, Callable[[Any], Any]] = {
    "in training": lambda model: model.train(),
    "BF16": lambda model: model.bfloat16(),
    "FP64": lambda model: model.double(),
    "compiled": torch.compile,
    "in parallel": nn.DataParallel,
    "dropout before the classifier": _with_dropout,
    "weight norm": lambda model: (parametrizations.weight_norm(model.head), model)[1],
}


@pytest.mark.parametrize("change", TAKEN.values(), ids=TAKEN.keys())
@torch.no_grad()
def test_models_are_taken_as_they_compute(change: Callable[[Any], Any]) -> None:
    images = torch.randn(2, 3, 32, 32)
    wanted = made()(images)
    model = change(made())
    dense = read(model).dense
    tolerance = 0.05 if next(model.parameters()).dtype == torch.bfloat16 else 1e-5
    assert next(dense.parameters()).dtype == torch.float32 and not dense.training
    torch.testing.assert_close(dense(images), wanted, rtol=0, atol=tolerance)


def test_the_program_s_own_model_stays_as_it_was() -> None:
    model = _with_dropout(made()).train().double()
    read(model)
    assert model.training and isinstance(model.head, nn.Sequential) and model.cls_token.dtype == torch.float64


def _patched(model: Any) -> Any:
    model.blocks[0].attn.forward = lambda x, **_: x
    return model


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a hook": (
        lambda model: (model.register_forward_hook(lambda *seen: -seen[2]), model)[1],
        "computes other logits than its weights do in a plain ViT",
    ),
    "a patch": (_patched, "computes other logits"),
    "pruned by torch": (
        lambda model: (prune.l1_unstructured(model.head, "weight", 0.3), model)[1],
        r"cannot be copied.*torch\.nn\.utils\.prune\.remove",
    ),
    "no numbers": (lambda model: model.to("meta"), "weights on the meta device"),
    "a layer of another kind": (
        lambda model: (setattr(model, "head", nn.Sequential(nn.LayerNorm(24), model.head)), model)[1],
        "it has no classifier",
    ),
}


@pytest.mark.parametrize(("change", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_models_that_compute_otherwise_are_refused(change: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(change(made()))


ITEMS: dict[str, tuple[Callable[[Tensor, int], Any], str]] = {
    "tables": (lambda image, label: {"image": image}, "item is a dict; give pairs"),
    "three": (lambda image, label: (image, label, 1), "item is a tuple; give pairs"),
    "bytes": (
        lambda image, label: (image.to(torch.uint8), label),
        r"of torch\.uint8; tiny_deit takes it normalised, in FP32",
    ),
    "one-hot": (lambda image, label: (image, torch.eye(10)[label]), "give the number of its class"),
    "labels in a list": (lambda image, label: (image, torch.tensor([label])), "give the number of its class"),
    "real labels": (lambda image, label: (image, float(label)), "give the number of its class"),
    "names": (lambda image, label: (image, "ant"), "label is 'ant'; give the number of its class"),
}


@pytest.mark.parametrize(("change", "said"), ITEMS.values(), ids=ITEMS.keys())
def test_items_of_another_kind_are_refused(change: Callable[[Tensor, int], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(made(), Items(change))
