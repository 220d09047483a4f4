"""Weights are found in whatever a training script wraps them in, and nothing that it keeps beside them is run."""

import argparse
import gzip
import io
import json
import logging
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.digits_deit import DIGITS_WEIGHTS
from lowpass.pipeline.checkpoints.load import load_model
from lowpass.pipeline.checkpoints.origin import origin_of
from lowpass.pipeline.checkpoints.state_dict import read_weights

State = dict[str, Tensor]
W = read_weights(DIGITS_WEIGHTS).state
NOISE = {name: torch.randn_like(tensor) for name, tensor in W.items()}


def under(prefix: str, state: State = W) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPED: dict[str, Any] = {
    "bare": W,
    "model": {"model": W, "epoch": 3, "best": np.float64(81.2), "rng": torch.zeros(8, dtype=torch.uint8)},
    "state_dict": {"state_dict": W, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]}},
    "both": {"model": {"state_dict": W}},
    "beside a number": W | {"epoch": 3},
    "EMA beside noise": {"state_dict": NOISE, "state_dict_ema": W},
    "model_ema beside noise": {"model": NOISE, "model_ema": under("module.")},
    "EMA and its settings": {"model": NOISE, "ema": {"module": W, "decay": 0.999}},
    "teacher beside student": {"student": under("module.", NOISE), "teacher": under("backbone.")},
    "both in one table": under("student.backbone.", NOISE) | under("teacher.backbone."),
    "student alone": {"student": under("backbone.")},
    "DDP": under("module."),
    "compiled DDP": under("_orig_mod.module."),
    "DDP of compiled": {"model": under("module._orig_mod.")},
    "Lightning": {
        "state_dict": under("model.") | {"criterion.weight": torch.ones(10), "metric.total": torch.tensor(3)},
        "pytorch-lightning_version": "2.5.0",
        "callbacks": {},
        "hyper_parameters": {"lr": 0.1},
    },
    "a backbone and a head": {
        ("" if name.startswith("head") else "backbone.") + name: tensor for name, tensor in W.items()
    },
    "an encoder in a net": under("net.encoder."),
    "a backbone and a head in Lightning": {
        ("model." if name.startswith("head") else "model.backbone.") + name: tensor for name, tensor in W.items()
    },
    "a head of another name": {
        name.replace("head.", "classifier.1.") if name.startswith("head") else "backbone." + name: tensor
        for name, tensor in W.items()
    },
    "blocks compiled, sharded and checkpointed one by one": {
        re.sub(r"^(blocks\.\d+)\.", r"_fsdp_wrapped_module.\1._fsdp_wrapped_module._orig_mod.", name).replace(
            ".attn.", "._checkpoint_wrapped_module.attn."
        ): tensor
        for name, tensor in W.items()
    },
    "Lightning's weight averaging": {"state_dict": under("model."), "current_model_state": under("model.", NOISE)},
    "thop's counters": W | {"total_ops": torch.zeros(1), "blocks.0.total_params": torch.zeros(1)},
    "two names of one table": {"model": W, "state_dict": dict(W)},
    "arguments and paths": {
        "model": W,
        "args": argparse.Namespace(lr=1e-3, output=Path("/some/where"), seeds=[np.int64(3)]),
        "history": {"top1": [np.float32(0.5)]},
        "curve": np.arange(4.0),
    },
}


def check(model: nn.Module, state: State = W) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("content", WRAPPED.values(), ids=WRAPPED.keys())
def test_weights_are_found(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    check(load_model("digits_deit", tmp_path / "weights.pth"))


def test_what_was_taken_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"state_dict": NOISE, "state_dict_ema": W}, tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO, "lowpass"):
        model = load_model("digits_deit", tmp_path / "weights.pth")
    assert "weights: state_dict_ema of weights.pth, which holds state_dict as well" in caplog.text
    assert (origin_of(model).weights_key, origin_of(model).other_weights) == ("state_dict_ema", ("state_dict",))
    check(load_model("digits_deit", tmp_path / "weights.pth", weights_key="state_dict"), NOISE)
    with pytest.raises(InputError, match=r"has no weights under 'ema'.*it has state_dict, state_dict_ema"):
        load_model("digits_deit", tmp_path / "weights.pth", weights_key="ema")


def test_several_models_are_not_guessed_at(tmp_path: Path) -> None:
    torch.save({"model": W, "state_dict": NOISE}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="holds several models: model, state_dict; choose one with --weights-key"):
        load_model("digits_deit", tmp_path / "weights.pth")
    check(load_model("digits_deit", tmp_path / "weights.pth", weights_key="model"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    narrow = {name: tensor.to(dtype) for name, tensor in W.items()}
    save_file(narrow, tmp_path / "weights.safetensors")
    check(load_model("digits_deit", tmp_path / "weights.safetensors"), {k: v.float() for k, v in narrow.items()})


class Net(nn.Module):
    """A user's own class, pickled whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def _script(path: Path) -> None:
    torch.jit.script(Net()).save(str(path))


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (lambda path: torch.save(Net(), path), r"a test_checkpoints\.Net is pickled in it(.|\n)*weights_only=False"),
        (lambda path: torch.save({"model": Net()}, path), r"a test_checkpoints\.Net is pickled in it"),
        (_script, r"is TorchScript(.|\n)*torch\.jit\.load"),
    ],
    ids=["module", "module in a table", "TorchScript"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_programs_are_refused_with_a_remedy(save: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    save(tmp_path / "weights.pth")
    with pytest.raises(InputError, match=said) as refused:
        load_model("digits_deit", tmp_path / "weights.pth")
    assert "save_file({" in str(refused.value) and str(refused.value).endswith("give weights.safetensors")


@pytest.mark.parametrize("name", ["weights.bin", "weights.SAFETENSORS", "größe und so", "weights.pth.tar"])
def test_a_file_is_what_it_holds(name: str, tmp_path: Path) -> None:
    """Whatever it is called."""
    save_file(W, tmp_path / name)
    check(load_model("digits_deit", tmp_path / name))
    torch.save(W, tmp_path / "weights.safetensors")
    check(load_model("digits_deit", tmp_path / "weights.safetensors"))


def _as_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights.pth", content)
    return file.getvalue()


def _as_tar(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"), io.BytesIO(content))
    return file.getvalue()


def _as_npz(content: bytes) -> bytes:
    file = io.BytesIO()
    np.savez(file, cls=np.frombuffer(content, np.uint8))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 1\n", "a pointer of Git LFS.*git lfs pull"),
        (gzip.compress(b"weights"), "it is compressed; unpack it"),
        (_as_tar(b""), "it is an archive; unpack it"),
        (_as_zip(b"weights"), "it is an archive; unpack it"),
        (_as_npz(b"weights"), r"it is NumPy's format; Google's ViTs become(.|\n)*checkpoint_path=.weights"),
        (b"\x89HDF\r\n", "it is HDF5, as Keras writes"),
        (b"<!DOCTYPE html>", "it is text"),
    ],
    ids=["LFS", "gzip", "tar", "zip", "npz", "Keras", "a web page"],
)
def test_other_formats_are_refused_by_name(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(InputError, match=said):
        load_model("digits_deit", tmp_path / "weights")


def test_an_average_without_names_is_not_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"model": W, "ema": {"decay": 0.9, "shadow_params": list(NOISE.values())}}, tmp_path / "weights.pth")
    check(load_model("digits_deit", tmp_path / "weights.pth"))
    assert "ema.shadow_params of weights.pth is an average without names, which is not read" in caplog.text


def sharded(folder: Path, end: str = "safetensors") -> Path:
    """The weights in two files with their index, and between them what an earlier save left."""
    parts = [dict(list(W.items())[start::2]) for start in (0, 1)]
    names = [f"model-{number:05d}-of-00002.{end}" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        (save_file if end == "safetensors" else torch.save)(part, folder / name)  # type: ignore[operator]
    save_file(NOISE, folder / "model-00003-of-00009.safetensors")
    index = folder / f"model.{end}.index.json"
    listed = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return index


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_weights_in_several_files(end: str, tmp_path: Path) -> None:
    """The index says which: what else lies beside them is not taken."""
    index = sharded(tmp_path, end)
    check(load_model("digits_deit", index))
    (tmp_path / f"model-00002-of-00002.{end}").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=rf"there is no .*00002\.{end}, which model\.{end}\.index\.json lists"):
        load_model("digits_deit", index)
    (tmp_path / "elsewhere").rename(tmp_path / f"model-00002-of-00002.{end}")
    index.write_text(index.read_text().replace("head.bias", "head.biases"))
    with pytest.raises(InputError, match=r"has no head\.biases, against what model.*index\.json says"):
        load_model("digits_deit", index)
    index.write_text("[]")
    with pytest.raises(InputError, match="is no index of weights"):
        load_model("digits_deit", index)


def test_the_remedy_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(load_model("digits_deit"), "weights.pth")
    with pytest.raises(InputError, match="VisionTransformer is pickled in it") as refused:
        load_model("digits_deit", "weights.pth")
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("  ")]
    exec("\n".join(lines), {})  # noqa: S102 - the two lines that the message gives
    check(load_model("digits_deit", "weights.safetensors"))


def without(*names: str) -> State:
    return {name: tensor for name, tensor in W.items() if name not in names}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            without(*(name for name in W if name.startswith("blocks.5"))),
            r"has no blocks\.5\.norm1\.weight, blocks\.5\.norm1\.bias, blocks\.5\.attn\.qkv\.weight and 9 more, which "
            r"digits_deit needs; it has 5 blocks, not 6",
        ),
        (
            W | {"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1), "d": torch.ones(1)},
            "holds a, b, c and 1 more",
        ),
        (without("head.weight", "head.bias"), "has no head.weight, head.bias, which .*it has no classifier"),
        (
            without("head.weight", "head.bias")
            | {f"head.{layer}.{part}": torch.ones(10, 96) for layer in (0, 2) for part in ("weight", "bias")},
            r"its classifier is head\.0, head\.2, which is not one linear layer",
        ),
        (
            {"backbone." + name: tensor for name, tensor in W.items()} | {"fc.weight": W["head.weight"]},
            r"holds two classifiers, backbone\.head\.weight and fc\.weight",
        ),
        (W | {"blocks.0.attn.qkv.lora_A": torch.ones(8, 96)}, "it holds LoRA adapters: merge them"),
        (without("head.bias") | {"head.zero_point": torch.tensor(0)}, "its layers are quantised"),
        (
            {name: (100 * tensor).to(torch.int8) for name, tensor in W.items()},
            "cls_token is of int8, not of real numbers",
        ),
        (W | {"norm.bias": W["norm.bias"].to_sparse()}, "norm.bias is torch.sparse_coo; save the weights as dense"),
        (W | {"norm.bias": W["norm.bias"].to("meta")}, "norm.bias is on the meta device"),
        (
            {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: W[name] for name in W},
            "it looks like a model that averages its tokens",
        ),
        (W | {"dist_token": torch.ones(1, 1, 96)}, "it looks like a DeiT that is distilled"),
        ({"conv_proj.weight": torch.ones(96, 3, 4, 4)}, "it looks like torchvision's: give --model vit_b_16"),
        ({"vit.embeddings.patch_embeddings.projection.weight": torch.ones(1)}, "it looks like a Hugging Face ViT"),
        ({"visual.conv1.weight": torch.ones(1)}, "it looks like CLIP's"),
    ],
)
def test_what_does_not_fit_is_described(state: State, said: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=said):
        load_model("digits_deit", tmp_path / "weights.pth")


def test_size_and_channels_follow_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """32 pixels in patches of 4 are 8 by 8 positions."""
    state = W | {
        "pos_embed": torch.randn(1, 1 + 36, 96),
        "patch_embed.proj.weight": W["patch_embed.proj.weight"].mean(1, keepdim=True),
    }
    torch.save(state, tmp_path / "weights.pth")
    model = load_model("digits_deit", tmp_path / "weights.pth")
    assert model(torch.zeros(1, 1, 24, 24)).shape == (1, 10)
    wide = load_model("digits_deit", tmp_path / "weights.pth", img_size="16x36")  # 4 by 9: as many positions
    assert wide(torch.zeros(1, 1, 16, 36)).shape == (1, 10)
    assert torch.equal(wide.state_dict()["pos_embed"], state["pos_embed"])
    with caplog.at_level(logging.INFO, "lowpass"):
        larger = load_model("digits_deit", tmp_path / "weights.pth", img_size=48)
    assert larger(torch.zeros(1, 1, 48, 48)).shape == (1, 10)
    assert "positions: resampled from images of 24x24 to 48x48" in caplog.text
    for wrong, said in (({"img_size": 30}, "not whole patches"), ({"in_chans": 3}, "takes images of 1 channels")):
        with pytest.raises(InputError, match=said):
            load_model("digits_deit", tmp_path / "weights.pth", **wrong)
    for text in ("", "x", "0", "12x", "-4", "2x3x4", "1.5"):
        with pytest.raises(InputError, match="--img-size"):
            load_model("digits_deit", img_size=text)


def test_preprocessing_is_the_model_s_unless_told_otherwise(tmp_path: Path) -> None:
    plain = load_model("deit_tiny_patch16_224.fb_in1k", random_weights=True).pretrained_cfg
    assert plain["crop_pct"] == 0.9 and plain["preprocessing_source"] == "timm's deit_tiny_patch16_224.fb_in1k"
    chosen = load_model(
        "deit_tiny_patch16_224", random_weights=True, mean=(0.1, 0.2, 0.3), crop_pct=1.0, interpolation="bilinear"
    ).pretrained_cfg
    assert (chosen["mean"], chosen["std"]) == ((0.1, 0.2, 0.3), plain["std"])
    assert (chosen["crop_pct"], chosen["interpolation"]) == (1.0, "bilinear")
    assert chosen["preprocessing_source"].endswith("; --mean, --crop-pct, --interpolation")
    for wrong in ({"mean": (0.5,)}, {"std": (0.5, 0.0, 0.5)}):
        with pytest.raises(InputError, match=r"--(mean has 1 values|std must be above 0)"):
            load_model("digits_deit", **wrong)
