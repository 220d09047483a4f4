"""Dense models by name, and the many ways in which a file of weights can be wrong."""

import io
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.digits_deit import DIGITS_WEIGHTS
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.checkpoints.state_dict import read_weights
from lowpass.pipeline.data.digits import DigitScenes
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.train.evaluate import top1

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Weights of a small model that timm knows by name."""
    return read_weights(DIGITS_WEIGHTS).state


def pth(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_the_shipped_weights() -> None:
    assert DIGITS_WEIGHTS.stat().st_size <= 3_000_000
    model = load_model("digits_deit")
    assert not model.training
    scenes = DigitScenes("test", renders=2)
    images, labels = zip(*(scenes[i] for i in range(0, 1000, 4)), strict=True)
    assert top1(model, [(torch.stack(images), torch.tensor(labels))]) > 97


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "optimizer": {"lr": 1}},
    ],
    ids=["bare", "under model", "under state_dict", "under both", "DDP", "DDP under model"],
)
def test_layouts_of_a_checkpoint(wrap: Callable[[State], Any], state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(pth(wrap(state)))
    loaded = load_model("digits_deit", path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_safetensors(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save({f"module.{name}": tensor for name, tensor in state.items()}))
    loaded = load_model("digits_deit", path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_deit_iii_layer_scale_is_renamed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(pth({"model": {"blocks.0.gamma_1": torch.ones(2), "blocks.11.gamma_2": torch.zeros(2)}}))
    assert sorted(read_weights(path).state) == ["blocks.0.ls1.gamma", "blocks.11.ls2.gamma"]


def test_the_class_count_is_read_off_the_head(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(pth(state | {"head.weight": torch.ones(7, 96), "head.bias": torch.zeros(7)}))
    model = load_model("digits_deit", path)
    assert model.num_classes == 7
    assert SlimViT.from_timm(model).architecture.dense.num_classes == 7


def test_random_weights_are_drawn_by_the_seed() -> None:
    one, same, other = (load_model("digits_deit", random_weights=True, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert not torch.equal(one["head.weight"], read_weights(DIGITS_WEIGHTS).state["head.weight"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("deit_tiny_patch16_225", r"; did you mean deit_tiny_patch16_224, .*\?$"),
        ("digit_deit", r"; did you mean .*digits_deit"),
        ("?", "timm has no model '[?]'$"),
        ("", "timm has no model ''"),
    ],
)
def test_an_unknown_model_is_refused_with_near_names(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        load_model(name, random_weights=True)


def test_weights_are_never_random_unless_asked_for() -> None:
    with pytest.raises(InputError, match="deit_tiny_patch16_224 needs trained weights: give --weights FILE"):
        load_model("deit_tiny_patch16_224")
    with pytest.raises(InputError, match="not both"):
        load_model("digits_deit", DIGITS_WEIGHTS, random_weights=True)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_missing_weights_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"there are no weights at .*{name}"):
        load_model("digits_deit", tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"cannot read the weights .*{name}"):
        load_model("digits_deit", tmp_path / name)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_truncated_weights_are_refused(suffix: str, share: float, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    content = pth(state) if suffix == "pth" else save(state)
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        InputError, match=rf"cannot read the weights .*weights\.{suffix}: truncated or not a checkpoint"
    ):
        load_model("digits_deit", path)


SMALL = {"head.weight": torch.ones(3, 2), "head.bias": torch.zeros(3)}


def _legacy() -> bytes:
    """As `torch.save` wrote files before version 1.6, and as old DeiT checkpoints still are."""
    buffer = io.BytesIO()
    torch.save(SMALL, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("suffix", "whole"),
    [("pth", pth(SMALL)), ("pth", _legacy()), ("safetensors", save(SMALL))],
    ids=["zip", "before 1.6", "safetensors"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(st.data())
def test_damaged_weights_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, whole: bytes, data: st.DataObject
) -> None:
    """Whatever the damage, there is no other end."""
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole)), st.integers(0, 255)), max_size=4)):
        if place < len(damaged):
            damaged[place] = value
    path = tmp_path_factory.mktemp("damaged") / f"weights.{suffix}"
    path.write_bytes(bytes(damaged))
    try:
        found = read_weights(path).state
    except InputError as error:
        assert path.name in str(error)
    else:
        assert all(isinstance(tensor, Tensor) for tensor in found.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(
    value: float, dtype: torch.dtype, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    bad = state["blocks.3.mlp.fc2.weight"].to(dtype, copy=True)
    bad[5, 7] = value
    path.write_bytes(pth(state | {"blocks.3.mlp.fc2.weight": bad}))
    with pytest.raises(InputError, match=r"blocks\.3\.mlp\.fc2\.weight holds NaN or infinite values"):
        load_model("digits_deit", path)


def _without(state: State, name: str) -> State:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: _without(state, "blocks.2.norm1.bias"),
            r"has no blocks\.2\.norm1\.bias, which",
        ),
        (
            lambda state: state | {"head_dist.bias": torch.ones(10)},
            r"holds head_dist\.bias, which",
        ),
        (
            lambda state: state | {"pos_embed": torch.ones(1, 51, 96)},
            r"pos_embed is \(1, 51, 96\): 50 image tokens do not form a square; give --img-size",
        ),
        (lambda state: state | {"head.weight": torch.ones(10, 95)}, r"head\.weight is \(10, 95\), but"),
        (lambda state: state | {"head.weight": torch.tensor(1.0)}, r"head\.weight"),
        (lambda state: {}, "holds no state dict"),
        (lambda state: {"model": {}}, "holds no state dict"),
        (lambda state: list(state.values()), "holds no state dict"),
        (lambda state: state["head.weight"], "holds no state dict"),
        (lambda state: dict(enumerate(state.values())), "holds no state dict"),
    ],
    ids=[
        "missing",
        "unknown",
        "shape",
        "head",
        "scalar head",
        "empty",
        "empty model",
        "list",
        "tensor",
        "keys",
    ],
)
def test_weights_of_something_else_are_refused(
    change: Callable[[State], Any], message: str, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(pth(change(state)))
    with pytest.raises(InputError, match=message):
        load_model("digits_deit", path)


class _Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("write", [pth, partial(pickle.dumps, protocol=2)], ids=["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_not_run(write: Callable[[Any], bytes], state: State, tmp_path: Path) -> None:
    trace, path = tmp_path / "executed", tmp_path / "weights.pth"
    path.write_bytes(write({"model": state, "payload": _Malicious(trace)}))
    with pytest.raises(InputError, match="cannot read the weights"):
        load_model("digits_deit", path)
    assert not trace.exists()
