"""DINOv3 in folders of Transformers: its own logits, and whatever lowpass cannot follow refused in a sentence."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.huggingface_dinov3 import ACTIVATIONS, BIASES
from lowpass.pipeline.checkpoints.load import as_timm, load_model
from lowpass.pipeline.checkpoints.origin import origin_of
from lowpass.pipeline.model.slim_vit import SlimViT

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_register_tokens": 2,
    "image_size": 16,
    "patch_size": 4,
    "id2label": {0: "ant", 1: "bee", 2: "cat"},
}
READS = {"CLS": 1, "CLS and average": 2}  # how many times as wide as a token the classifier is


class Classifier(transformers.PreTrainedModel):
    """What people put on a DINOv3 of Transformers, which has no classifier of its own."""

    config_class = transformers.DINOv3ViTConfig

    def __init__(self, config: Any, reads: int = 1, called: str = "backbone") -> None:
        super().__init__(config)
        self.reads, self.called = reads, called
        setattr(self, called, transformers.DINOv3ViTModel(config))
        self.classifier = nn.Linear(reads * config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, classes]."""
        tokens = getattr(self, self.called)(images).last_hidden_state
        read = [tokens[:, 0], tokens[:, 1 + self.config.num_register_tokens :].mean(1)]
        return self.classifier(torch.cat(read[: self.reads], -1))


def saved(folder: Path, reads: int = 1, called: str = "backbone", **changes: Any) -> Classifier:
    """A small random model in `folder`, every one of whose parameters matters."""
    torch.manual_seed(0)
    model = Classifier(transformers.DINOv3ViTConfig(**(SIZES | changes)), reads, called).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def noise(size: tuple[int, int] = (16, 16), channels: int = 3) -> Tensor:
    return torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(1))


def agree(converted: nn.Module, model: Classifier, images: Tensor) -> None:
    """The timm model and a slim one with nothing removed."""
    with torch.no_grad():
        wanted = model(images)
        torch.testing.assert_close(converted(images), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(SlimViT.from_timm(converted)(images), wanted, rtol=0, atol=1e-5)


@settings(max_examples=25)
@given(
    st.fixed_dictionaries(
        {
            **{field: st.booleans() for field, _ in BIASES.values()},
            "num_register_tokens": st.integers(0, 3),
            "num_hidden_layers": st.integers(1, 3),
            "num_attention_heads": st.sampled_from([1, 2, 3, 6]),
            "intermediate_size": st.integers(1, 60),
            "num_channels": st.integers(1, 3),
            "hidden_act": st.sampled_from(list(ACTIVATIONS)),
            "use_gated_mlp": st.booleans(),
            "layer_norm_eps": st.sampled_from([1e-6, 1e-5, 1e-2]),
            "rope_theta": st.sampled_from([1.0, 10.0, 100.0, 10_000.0]),
            "patch_size": st.sampled_from([4, [4, 4], [2, 4], [8, 4]]),
            "image_size": st.sampled_from([16, [16, 24], [32, 8]]),
            "pos_embed_shift": st.sampled_from([None, 0.5]),
        }
    ),
    st.sampled_from(list(READS.values())),
    st.sampled_from([None, (16, 16), (24, 40), (48, 8)]),
)
def test_the_logits_are_those_of_transformers(changes: dict[str, Any], reads: int, size: Any) -> None:
    """At the config's image size or another."""
    with TemporaryDirectory() as folder:
        model = saved(Path(folder), reads, **changes)
        converted = load_model(folder, img_size=size)
    own = changes["image_size"]
    sides = size or ((own, own) if isinstance(own, int) else tuple(own))
    assert SlimViT.from_timm(converted).architecture.dense.img_size == sides
    agree(converted, model, noise(sides, changes["num_channels"]))


@pytest.mark.parametrize(
    "change", [{"rope_theta": 90.0}, {"layer_norm_eps": 1e-3}, {"hidden_act": "quick_gelu"}], ids=str
)
@torch.no_grad()
def test_what_the_config_says_matters(change: dict[str, Any], tmp_path: Path) -> None:
    """Without it the comparison above would say nothing."""
    model = saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert (load_model(str(tmp_path))(noise()) - model(noise())).abs().max() > 1e-4


@pytest.mark.parametrize("called", ["model", "dinov3", "dinov3_vit"])
def test_the_backbone_may_have_any_name(called: str, tmp_path: Path) -> None:
    model = saved(tmp_path, called=called)
    agree(load_model(str(tmp_path)), model, noise())


def test_names_of_either_version(tmp_path: Path) -> None:
    """Blocks lie in an encoder called `model` as a module, and in none in files."""
    model = saved(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    inner = {name.replace("backbone.layer.", "backbone.model.layer."): tensor for name, tensor in state.items()}
    assert inner.keys() != state.keys()
    save_file(inner, file)
    agree(load_model(str(tmp_path)), model, noise())


def test_its_classes_and_who_says_so(tmp_path: Path) -> None:
    saved(tmp_path)
    converted = load_model(str(tmp_path))
    assert origin_of(converted).classes == ("ant", "bee", "cat")
    prep = SlimViT.from_timm(converted).architecture.preprocessing
    assert prep.source == f"Transformers' default for dinov3_vit ({tmp_path} has no preprocessor_config.json)"
    own = transformers.DINOv3ViTImageProcessor()
    assert (prep.mean, prep.std) == (tuple(own.image_mean), tuple(own.image_std))
    assert (prep.crop_pct, prep.crop_mode, prep.interpolation) == (1.0, "squash", "bilinear")


def test_preprocessing(tmp_path: Path) -> None:
    """The pixels that Transformers would give the model, but for how the libraries round; and their size is the
    model's."""
    model = saved(tmp_path)
    processor = transformers.DINOv3ViTImageProcessor(size={"height": 24, "width": 32}, image_std=[0.2, 0.3, 0.4])
    processor.save_pretrained(tmp_path)
    converted = load_model(str(tmp_path))
    agree(converted, model, noise((24, 32)))
    prep = SlimViT.from_timm(converted).architecture.preprocessing
    assert prep.source == f"preprocessor_config.json of {tmp_path}"
    rows, columns = np.mgrid[:40, :50]
    picture = Image.fromarray(np.stack([rows * 6, columns * 5, rows + columns], -1).astype(np.uint8))
    transform = create_transform(
        input_size=(3, 24, 32), mean=prep.mean, std=prep.std, interpolation=prep.interpolation,
        crop_pct=prep.crop_pct, crop_mode=prep.crop_mode,
    )  # fmt: skip
    wanted = processor(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transform(picture), wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"use_gated_mlp": True},
            r"use_gated_mlp in config.json is True, but the weights have no layer.0.*gate_proj; give",
        ),
        ({"hidden_act": "relu"}, r"hidden_act in config.json is 'relu', but lowpass takes .*; train one of gelu, "),
        ({"num_attention_heads": 4}, r"num_attention_heads in config.json is 4: heads of 6 channels .*; take a model"),
        ({"num_attention_heads": 5}, "24 channels cannot be divided into the 5 heads"),
        ({"rope_theta": 0.0}, r"rope_theta in config.json is 0; give a number above 0"),
        ({"rope_theta": None}, "do not describe a dinov3_vit"),
        (
            {"rope_parameters": {"rope_theta": 10.0}},
            r"rope_parameters in config.json is .*; if its angles",
        ),
        ({"key_bias": True}, r"key_bias in config.json is True, but the weights have no layer.0.*k_proj.bias; give"),
        ({"value_bias": False}, r"value_bias in config.json is False, but the weights have layer.0.*v_proj.bias; give"),
        ({"mlp_bias": False}, r"mlp_bias in config.json is False, but the weights have layer.0.*down_proj.bias; give"),
        ({"image_size": 18}, r"image_size in config.json is 18x18, not whole patches of 4x4 .*; give --img-size"),
        ({"num_register_tokens": 0}, "holds reg_token, which dinov3_vit .* does not have"),
        ({"num_register_tokens": 3}, r"reg_token is \(1, 2, 24\), but dinov3_vit .* has \(1, 3, 24\)"),
        ({"num_hidden_layers": 3}, r"has no blocks\.2\.gamma_1"),
        ({"intermediate_size": 41}, r"blocks\.0\.mlp\.fc1\.weight is \(40, 24\)"),
        ({"patch_size": None}, "do not describe a dinov3_vit"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_it_cannot_follow_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=said) as refused:
        load_model(str(tmp_path))
    assert str(tmp_path) in str(refused.value)


def test_a_gate_that_the_config_does_not_know(tmp_path: Path) -> None:
    saved(tmp_path, use_gated_mlp=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_gated_mlp": False}))
    with pytest.raises(
        InputError, match=r"use_gated_mlp in config.json is False, but the weights have a layer.0.*; give"
    ):
        load_model(str(tmp_path))


def test_sizes_that_are_not_whole_patches(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(InputError, match="--img-size is 16x18, not whole patches of 4x4"):
        load_model(str(tmp_path), img_size=(16, 18))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 30, "width": 16}}))
    with pytest.raises(InputError, match=r"size in preprocessor_config.json is 30x16, not whole patches of 4x4"):
        load_model(str(tmp_path))
    with pytest.raises(InputError, match=r"--in-chans is 1, but .* takes images of 3 channels"):
        load_model(str(tmp_path), img_size=16, in_chans=1)


def test_what_has_no_such_classifier(tmp_path: Path) -> None:
    bare = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES))
    bare.save_pretrained(tmp_path / "bare")
    no_classifier = r"is a Hugging Face dinov3_vit without a classifier: .* no classifier\.weight; train a linear layer"
    with pytest.raises(InputError, match=no_classifier):
        load_model(str(tmp_path / "bare"))
    with pytest.raises(InputError, match=no_classifier):
        as_timm(bare)
    saved(tmp_path / "wide", reads=2)
    file = tmp_path / "wide" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"classifier.weight": torch.ones(3, 72)}, file)
    with pytest.raises(InputError, match=r"classifier.weight is \(3, 72\), .* reads CLS, 24 channels, or .* 48; train"):
        load_model(str(tmp_path / "wide"))
    save_file(state | {"classifier.norm.weight": torch.ones(48)}, file)
    with pytest.raises(InputError, match=r"holds head\.norm\.weight, which dinov3_vit"):
        load_model(str(tmp_path / "wide"))


def test_a_file_without_its_folder_says_what_it_looks_like(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(InputError, match="it looks like a Hugging Face DINOv3: give its folder"):
        load_model("vit_small_patch16_dinov3", tmp_path / "model.safetensors")
