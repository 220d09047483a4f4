"""Models of other libraries, as those save them: the same logits."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from timm.data import create_transform
from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.load import as_timm, load_model
from lowpass.pipeline.checkpoints.origin import origin_of
from lowpass.pipeline.checkpoints.torchvision_models import NAMES, Named
from lowpass.pipeline.model.slim_vit import SlimViT

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 4,
    "id2label": {0: "ant", 1: "bee", 2: "cat"},
}
HUGGING_FACE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ViT": (transformers.ViTConfig, transformers.ViTForImageClassification, {"intermediate_size": 40}),
    "ViT, no bias, tanh GELU": (
        transformers.ViTConfig,
        transformers.ViTForImageClassification,
        {"intermediate_size": 40, "qkv_bias": False, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "DeiT": (transformers.DeiTConfig, transformers.DeiTForImageClassification, {"intermediate_size": 40}),
    "DeiT with teacher": (
        transformers.DeiTConfig,
        transformers.DeiTForImageClassificationWithTeacher,
        {"intermediate_size": 40},
    ),
    "DINOv2": (transformers.Dinov2Config, transformers.Dinov2ForImageClassification, {"mlp_ratio": 2}),
    "DINOv2 with registers": (
        transformers.Dinov2WithRegistersConfig,
        transformers.Dinov2WithRegistersForImageClassification,
        {"mlp_ratio": 2, "num_register_tokens": 3},
    ),
    "DINOv2 with SwiGLU": (
        transformers.Dinov2Config,
        transformers.Dinov2ForImageClassification,
        {"mlp_ratio": 3, "use_swiglu_ffn": True},
    ),
    "DINOv2 with registers and SwiGLU": (
        transformers.Dinov2WithRegistersConfig,
        transformers.Dinov2WithRegistersForImageClassification,
        {"mlp_ratio": 4, "use_swiglu_ffn": True, "num_register_tokens": 3},
    ),
}
kinds = pytest.mark.parametrize("kind", HUGGING_FACE)


def saved(kind: str, folder: Path, **changes: Any) -> nn.Module:
    """A small random model of Transformers in `folder`, every one of whose parameters matters."""
    config, model_class, more = HUGGING_FACE[kind]
    torch.manual_seed(0)
    model: nn.Module = model_class(config(**(SIZES | more | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


def agree(converted: nn.Module, images: torch.Tensor, wanted: torch.Tensor) -> None:
    """The timm model and a slim one with nothing removed."""
    with torch.no_grad():
        torch.testing.assert_close(converted(images), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(SlimViT.from_timm(converted)(images), wanted, rtol=0, atol=1e-5)


def noise(size: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))


@kinds
@torch.no_grad()
def test_hugging_face_folders(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    converted = load_model(str(tmp_path))
    agree(converted, noise(), model(noise()).logits)
    assert origin_of(converted).classes == ("ant", "bee", "cat")
    assert SlimViT.from_timm(converted).architecture.preprocessing.source.startswith("Transformers' default")


@kinds
@torch.no_grad()
def test_hugging_face_in_memory(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path)
    agree(as_timm(model), noise(), model(noise()).logits)


@torch.no_grad()
def test_an_mlp_of_any_width(tmp_path: Path) -> None:
    """timm is told a ratio, and 61 / 28 * 28 is below 61."""
    model = saved("ViT", tmp_path, hidden_size=28, num_attention_heads=4, intermediate_size=61)
    agree(load_model(str(tmp_path)), noise(), model(noise()).logits)


@torch.no_grad()
def test_dinov2_at_the_size_of_its_processor(tmp_path: Path) -> None:
    """As Transformers does as it runs: positions of 16 pixels, images of 24."""
    model = saved("DINOv2", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 28}, "do_center_crop": True})
    )
    converted = load_model(str(tmp_path))
    agree(converted, noise(24), model(noise(24)).logits)
    assert SlimViT.from_timm(converted).architecture.preprocessing.crop_pct == pytest.approx(24 / 28)


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (transformers.ViTImageProcessor(size={"height": 16, "width": 16}), (20, 32)),
        (transformers.ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False), (20, 20)),
        (
            transformers.DeiTImageProcessor(size={"height": 18, "width": 18}, crop_size={"height": 16, "width": 16}),
            (20, 32),
        ),
        (
            transformers.BitImageProcessor(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}),
            (20, 32),
        ),
    ],
    ids=["ViT", "ViT as it is", "DeiT", "DINOv2's"],
)
def test_hugging_face_preprocessing(processor: Any, size: tuple[int, int], tmp_path: Path) -> None:
    """The pixels that Transformers would give the model, but for how the libraries round."""
    saved("ViT", tmp_path)
    processor.save_pretrained(tmp_path)
    architecture = SlimViT.from_timm(load_model(str(tmp_path))).architecture
    prep = architecture.preprocessing
    assert prep.source == f"preprocessor_config.json of {tmp_path}"
    rows, columns = np.mgrid[: size[0], : size[1]]
    smooth = np.stack([rows * 6, columns * 5, rows + columns], -1).astype(np.uint8)
    transform = create_transform(
        input_size=(3, 16, 16),
        mean=prep.mean,
        std=prep.std,
        interpolation=prep.interpolation,
        crop_pct=prep.crop_pct,
        crop_mode=prep.crop_mode,
    )
    wanted = processor(Image.fromarray(smooth), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transform(Image.fromarray(smooth)), wanted, rtol=0, atol=0.05)


def test_hugging_face_that_is_none_of_these(tmp_path: Path) -> None:
    saved("ViT", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"model_type": "bert"}, "is a Hugging Face 'bert'; lowpass takes vit, deit, dinov2"),
        ({"hidden_act": "relu"}, "has relu MLPs, not GELU"),
        ({"num_hidden_layers": 3}, "has no blocks.2.norm1.weight"),
        ({"patch_size": None}, "do not describe a vit"),
        ({"num_attention_heads": 5}, "24 channels cannot be divided into the 5 heads"),
        ({"hidden_size": "many"}, "do not describe a vit"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=said):
            load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_size": 24}))
    with pytest.raises(InputError, match="do not describe a vit: it lacks 'patch_size'"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"config\.json is not a JSON object"):
        load_model(str(tmp_path))
    transformers.ViTModel(transformers.ViTConfig(**SIZES)).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="without a classifier"):
        load_model(str(tmp_path / "bare"))
    with pytest.raises(InputError, match="there is no folder"):
        load_model(str(tmp_path / "nowhere"))


@torch.no_grad()
def test_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 4, 2, 3, 24, 40, num_classes=5).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    agree(as_timm(model), noise(), model(noise()))
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pth")
    monkeypatch.setitem(NAMES, "vit_b_16", Named(24, 4, 3))
    converted = load_model("vit_b_16", tmp_path / "w.pth")
    agree(converted, noise(), model(noise()))
    prep = SlimViT.from_timm(converted).architecture.preprocessing
    assert (prep.crop_pct, prep.interpolation, prep.source) == (224 / 256, "bilinear", "torchvision's vit_b_16")
    with pytest.raises(InputError, match="has 24 channels and patches of 4x4; vit_b_32 has 768 and 32x32"):
        load_model("vit_b_32", tmp_path / "w.pth")
    with pytest.raises(InputError, match="vit_b_16 is torchvision's: give its state dict"):
        load_model("vit_b_16")
    torch.save(load_model("digits_deit").state_dict(), tmp_path / "digits.pth")
    with pytest.raises(InputError, match=r"has no conv_proj\.weight, which torchvision's vit_b_16 needs"):
        load_model("vit_b_16", tmp_path / "digits.pth")


def test_names_of_torchvision_are_its_own() -> None:
    """Head counts and preprocessing, as torchvision has them."""
    for name, known in NAMES.items():
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        assert model.encoder.layers[0].num_heads == known.heads
        assert (model.hidden_dim, model.patch_size) == (known.dim, known.patch)
        for weights in torchvision.models.get_model_weights(name):
            if "LINEAR" in weights.name and name != "vit_h_14":
                continue  # nothing tells them from weights of the same size that see less of a picture
            transform = weights.transforms()
            found = known.preprocessing(transform.crop_size[0])
            assert found["crop_pct"] == transform.crop_size[0] / transform.resize_size[0], weights
            assert found["interpolation"] == transform.interpolation.value, weights


@pytest.mark.parametrize(
    "head",
    [
        lambda head: head,
        lambda head: nn.Sequential(nn.Dropout(0.1), head),
        lambda head: nn.Sequential(OrderedDict(classifier=head)),
    ],
    ids=["a layer", "a layer behind dropout", "a named layer"],
)
@torch.no_grad()
def test_torchvision_with_a_head_of_one_s_own(head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tutorials put one on."""
    model = torchvision.models.VisionTransformer(16, 4, 2, 3, 24, 40).eval()
    model.heads = head(nn.Linear(24, 5)).eval()
    agree(as_timm(model), noise(), model(noise()))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    monkeypatch.setitem(NAMES, "vit_b_16", Named(24, 4, 3))
    agree(load_model("vit_b_16", tmp_path / "w.pth"), noise(), model(noise()))


@torch.no_grad()
def test_positions_of_a_known_size_are_resampled_to_another_of_as_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder of Transformers says that its 16 positions are 4 by 4: 2 by 8 are others. A name of timm's does not."""
    model = saved("ViT", tmp_path)
    with caplog.at_level("INFO", "lowpass"):
        wide = load_model(str(tmp_path), img_size="8x32")
    assert "positions: resampled from images of 16x16 to 8x32" in caplog.text
    images = torch.randn(2, 3, 8, 32)
    torch.testing.assert_close(wide(images), model(images, interpolate_pos_encoding=True).logits, rtol=0, atol=0.05)
    with caplog.at_level("INFO", "lowpass"):
        load_model("digits_deit", img_size="16x64")
    assert "positions: 64, taken to be for 16x64 as --img-size says, not resampled" in caplog.text


@torch.no_grad()
def test_transformers_in_lightning_and_in_several_files(tmp_path: Path) -> None:
    model = saved("ViT", tmp_path)
    torch.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "last.ckpt")
    (tmp_path / "model.safetensors").unlink()
    agree(load_model(str(tmp_path), tmp_path / "last.ckpt"), noise(), model(noise()).logits)
    with pytest.raises(InputError, match=r"holds no weights: none of .*, model\.safetensors\.index\.json"):
        load_model(str(tmp_path))
    state = model.state_dict()
    for number in (1, 2):
        part = {name: tensor for index, (name, tensor) in enumerate(state.items()) if index % 2 == number - 1}
        torch.save(part, tmp_path / f"pytorch_model-{number:05d}-of-00002.bin")
    listed = {name: f"pytorch_model-{1 + index % 2:05d}-of-00002.bin" for index, name in enumerate(state)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": listed}))
    agree(load_model(str(tmp_path)), noise(), model(noise()).logits)


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.5] * 3}, 0.5, 0.25),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3}, 0.5, 0.2),
        ({"do_rescale": False, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 0.5, 0.25),
        ({"image_mean": 0.5, "image_std": 0.25}, 0.5, 0.25),
    ],
    ids=["another factor", "pixels to 255", "scaled before", "one for all channels"],
)
def test_pixels_as_a_processor_scales_them(processor: Any, mean: float, std: float, tmp_path: Path) -> None:
    saved("ViT", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    prep = SlimViT.from_timm(load_model(str(tmp_path))).architecture.preprocessing
    assert prep.mean == pytest.approx((mean,) * 3) and prep.std == pytest.approx((std,) * 3)
    assert prep.interpolation == "bilinear"  # as Transformers has it for a ViT where the file does not say


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_mean": "half"}, "its mean is 'half'; give --mean, or mend it"),
        ({"image_std": [0, 1, 1]}, r"preprocessor_config.json of .*: --std must be above 0"),
    ],
)
def test_a_processor_that_makes_no_sense(change: Any, said: str, tmp_path: Path) -> None:
    saved("ViT", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(change))
    with pytest.raises(InputError, match=said):
        load_model(str(tmp_path))
    assert load_model(str(tmp_path), mean=(0.5,) * 3, std=(0.5,) * 3) is not None


def test_folders_that_hold_no_model_are_told_apart(tmp_path: Path) -> None:
    saved("ViT", tmp_path / "trained" / "checkpoint-500")
    with pytest.raises(InputError, match="there is one in checkpoint-500: give that folder"):
        load_model(str(tmp_path / "trained"))
    with pytest.raises(InputError, match=r"model\.safetensors is a file: give it as --weights"):
        load_model(str(tmp_path / "trained" / "checkpoint-500" / "model.safetensors"))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match=r"is a PEFT adapter: merge it into its model \(merge_and_unload"):
        load_model(str(tmp_path))


@torch.no_grad()
def test_a_folder_in_timm_s_hub_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("tiny_deit", num_classes=3).eval()
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.8}
    timm.models.save_for_hf(
        model,
        tmp_path,
        model_config={"label_names": ["a", "b", "c"]},
        safe_serialization=True,
    )
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        loaded = load_model(name)
        images = noise(32)
        agree(loaded, images, model(images))
        prep = SlimViT.from_timm(loaded).architecture.preprocessing
        assert origin_of(loaded).classes == ("a", "b", "c")
        assert prep.source == str(tmp_path / "config.json")
        assert (prep.mean, prep.crop_pct) == ((0.1, 0.2, 0.3), 0.8)


def test_older_configs_of_timm(tmp_path: Path) -> None:
    """Flat, with their labels under another name, or by number."""
    timm.models.save_for_hf(timm.create_model("tiny_deit", num_classes=3), tmp_path, safe_serialization=True)
    whole = json.loads((tmp_path / "config.json").read_text())
    flat = {"architecture": "tiny_deit", "mean": [0.1, 0.2, 0.3], "std": [0.5] * 3, "crop_pct": 0.8}

    def loaded(config: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return load_model(str(tmp_path))

    prep = SlimViT.from_timm(loaded(flat | {"labels": ["a", "b", "c"]})).architecture.preprocessing
    assert (prep.mean, prep.crop_pct, prep.source) == ((0.1, 0.2, 0.3), 0.8, str(tmp_path / "config.json"))
    assert origin_of(load_model(str(tmp_path))).classes == ("a", "b", "c")
    assert origin_of(loaded(whole | {"label_names": {"2": "c", "0": "a", "1": "b"}})).classes == ("a", "b", "c")
    assert origin_of(loaded(whole | {"label_names": {"2": "c", "3": "a", "1": "b"}})).classes is None
    for change, said in (
        ({"pretrained_cfg": {"mean": "x"}}, "its mean is 'x'; give --mean"),
        ({"pretrained_cfg": {"interpolation": "random"}}, "its interpolation is 'random'; give --interpolation"),
        ({"pretrained_cfg": {"crop_pct": "all"}}, "its crop_pct is 'all'; give --crop-pct"),
        ({"pretrained_cfg": [1]}, r"pretrained_cfg is \[1\], not settings"),
        ({"model_args": [1]}, r"model_args are \[1\], not settings"),
    ):
        with pytest.raises(InputError, match=said):
            loaded(whole | change)


def test_a_hub_without_a_network_is_an_error_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it tries again for half a minute
    with pytest.raises(InputError, match=r"cannot get hf-hub:nobody/nothing: .*a folder or a file works without"):
        load_model("hf-hub:nobody/nothing")
