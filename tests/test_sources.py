"""Models of other libraries, as those save them: the same logits."""

import json
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
        first = torchvision.models.get_model_weights(name).DEFAULT
        if name == "vit_h_14":
            first = torchvision.models.ViT_H_14_Weights.IMAGENET1K_SWAG_E2E_V1
        elif name == "vit_b_16":
            first = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1
        transform = first.transforms()
        assert model.encoder.layers[0].num_heads == known.heads
        assert (model.hidden_dim, model.patch_size) == (known.dim, known.patch)
        assert (transform.resize_size, transform.crop_size) == ([known.resize], [known.crop])
        assert transform.interpolation.value == known.interpolation


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


def test_a_hub_without_a_network_is_an_error_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else it tries again for half a minute
    with pytest.raises(InputError, match=r"cannot get hf-hub:nobody/nothing: .*a folder or a file works without"):
        load_model("hf-hub:nobody/nothing")
