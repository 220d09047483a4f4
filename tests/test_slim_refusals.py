"""What the slim ViT refuses: damaged files, impossible tables, and models of another kind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeViT
from timm.layers import Attention, DiffAttention, Mlp, PatchEmbed, SwiGLUPacked
from timm.models import Eva, ResNet, SwinTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.block_shape import BlockShape
from lowpass.pipeline.model.from_timm import describe_dense
from lowpass.pipeline.model.slim_vit import ARCHITECTURE_FILE, WEIGHTS_FILE, SlimViT


@pytest.fixture
def run(make_vit: MakeViT, tmp_path: Path) -> Path:
    """A run directory whose blocks drop tokens and are thin."""
    slim = SlimViT.from_timm(make_vit())
    blocks = (
        BlockShape(heads=2, qk_dim=4, v_dim=6, hidden=50, keep=10),
        BlockShape(heads=3, qk_dim=8, v_dim=8, hidden=96, keep=7),
    )
    SlimViT(slim.architecture.model_copy(update={"blocks": blocks})).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [ARCHITECTURE_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_files_refused(name: str, share: float, run: Path) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: int(share * (len(content) - 1))])
    with pytest.raises(InputError, match=name):
        SlimViT.load(run)


@pytest.mark.parametrize("name", [ARCHITECTURE_FILE, WEIGHTS_FILE])
def test_missing_files_refused(name: str, run: Path) -> None:
    (run / name).unlink()
    with pytest.raises(InputError, match=f"cannot read .*{name}"):
        SlimViT.load(run)


@pytest.mark.parametrize("name", [ARCHITECTURE_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("content", [b"\x00" * 100, b"\xff" * 100, b"{}", b"[]", b'{"blocks": []}'])
def test_damaged_files_refused(name: str, content: bytes, run: Path) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        SlimViT.load(run)


Table = dict[str, Any]


def _set(field: str, value: object, block: int = 0) -> Callable[[Table], None]:
    def change(table: Table) -> None:
        table["blocks"][block][field] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("heads", 4), "block 0: heads is 4, but VisionTransformer has only 3"),
        (_set("qk_dim", 9, 1), "block 1: qk_dim is 9, but VisionTransformer has only 8"),
        (_set("v_dim", 9), "block 0: v_dim is 9, but VisionTransformer has only 8"),
        (_set("hidden", 97, 1), "block 1: hidden is 97, but VisionTransformer has only 96"),
        (_set("keep", 17), "block 0: keep is 17, but only 16 image tokens enter it"),
        (_set("keep", 11, 1), "block 1: keep is 11, but only 10 image tokens enter it"),
        (_set("keep", 0), r"blocks\.0\.keep"),
        (_set("hidden", "many"), r"blocks\.0\.hidden"),
        (_set("width", 3), r"blocks\.0\.width"),
        (lambda table: table["blocks"].pop(), "has 2 blocks, the architecture 1"),
        (lambda table: table.pop("qk_scale"), "qk_scale"),
        (lambda table: table["dense"].update(depth=0), "depth"),
        (lambda table: table.update(token_cutoff=1.0), "token_cutoff"),
        (lambda table: table.update(energy_norm="l3"), "energy_norm"),
    ],
)
def test_impossible_tables_refused(change: Callable[[Table], None], message: str, run: Path) -> None:
    table = json.loads((run / ARCHITECTURE_FILE).read_text())
    change(table)
    (run / ARCHITECTURE_FILE).write_text(json.dumps(table))
    with pytest.raises(InputError, match=message):
        SlimViT.load(run)


@pytest.mark.parametrize("field", ["heads", "qk_dim", "v_dim", "hidden"])
def test_weights_of_another_table_refused(field: str, run: Path) -> None:
    table = json.loads((run / ARCHITECTURE_FILE).read_text())
    table["blocks"][0][field] -= 1
    (run / ARCHITECTURE_FILE).write_text(json.dumps(table))
    with pytest.raises(InputError, match=f"{WEIGHTS_FILE} does not hold the weights of its architecture"):
        SlimViT.load(run)


class Dual(DiffAttention):
    """timm's own, told to weigh by two numbers."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings, dual_lambda=True)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "average and maximum pooling": ({"global_pool": "avgmax"}, "'avgmax' pooling"),
    "no pooling": ({"global_pool": ""}, "'' pooling"),
    "no classifier": ({"num_classes": 0}, "no classifier"),
    "no blocks": ({"depth": 0}, "no blocks"),
    "no positions": ({"pos_embed": "none"}, "position embedding"),
    "RMS norm": ({"norm_layer": "rmsnorm"}, "norm"),
    "normalised patches": ({"embed_norm_layer": "layernorm"}, "patch embedding"),
    "another patch embedding": ({"embed_layer": type("Other", (PatchEmbed,), {})}, "patch embedding"),
    "an image cut short": ({"img_size": 18}, "patch"),
    "a padded image": ({"img_size": 18, "dynamic_img_pad": True}, "patch"),
    "normalised queries": ({"qk_norm": True}, "are normalised, or its output gated"),
    "another attention": ({"attn_layer": type("Own", (Attention,), {})}, "attention is not timm's standard"),
    "other differential attention": ({"attn_layer": Dual}, "attention is not timm.s standard"),
    "normalised differential attention": ({"attn_layer": DiffAttention, "scale_attn_norm": True}, "dual lambda"),
    "no projection bias": ({"proj_bias": False}, "bias"),
    "ReLU": ({"act_layer": "relu"}, "GELU"),
    "SwiGLU with a norm": ({"mlp_layer": SwiGLUPacked, "scale_mlp_norm": True}, "gated MLP has a norm over hidden"),
    "SwiGLU and attention pooling": (
        {"mlp_layer": SwiGLUPacked, "global_pool": "map", "class_token": False},
        "attention pooling, and its MLP is gated",
    ),
    "an MLP without biases": (
        {"mlp_layer": lambda *sizes, **settings: Mlp(*sizes, **settings | {"bias": False})},
        "with biases",
    ),
    "another MLP": ({"mlp_layer": type("Own", (Mlp,), {})}, "MLP"),
    "norm after the branches": ({"block_fn": ResPostBlock, "init_values": 0.1}, "standard Block"),
    "parallel branches": ({"block_fn": ParallelScalingBlock}, r"side by side \(ParallelScalingBlock\)"),
    "distilled with registers": ({"kind": VisionTransformerDistilled, "reg_tokens": 1}, "register"),
}


@pytest.mark.parametrize(("settings", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_other_vits_refused(settings: dict[str, Any], reason: str, make_vit: MakeViT) -> None:
    model = make_vit(**settings)
    with pytest.raises(InputError, match=f"not a plain ViT: .*{reason}.*; use one such as deit_small"):
        SlimViT.from_timm(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SwinTransformer(img_size=16, patch_size=2, embed_dim=8, depths=(1,), num_heads=(2,), window_size=4),
        lambda: ResNet(BasicBlock, [1, 1, 1, 1], channels=(8, 8, 8, 8), num_classes=5),
        lambda: Eva(img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=5),
        lambda: nn.Linear(3, 5),
    ],
    ids=["Swin", "ResNet", "EVA", "Linear"],
)
def test_other_models_refused(make: Callable[[], nn.Module]) -> None:
    model = make()
    with pytest.raises(InputError, match=f"is a {type(model).__name__}, not a plain ViT; use a DeiT or ViT such as"):
        SlimViT.from_timm(model)


def test_a_refusal_names_the_timm_model(make_vit: MakeViT) -> None:
    model = make_vit(qk_norm=True)
    model.pretrained_cfg = {"architecture": "vit_small_normalised"}
    with pytest.raises(InputError, match=r"^vit_small_normalised is not a plain ViT"):
        describe_dense(model)


@pytest.mark.parametrize(
    ("changes", "why"), [({"num_classes": 1}, "its classifier has one output"), ({}, "its classifier has no bias")]
)
def test_classifiers_that_say_nothing_refused(changes: dict[str, Any], why: str, make_vit: MakeViT) -> None:
    vit = make_vit(**changes)
    if not changes:
        vit.head = nn.Linear(24, 5, bias=False)
    with pytest.raises(InputError, match=why):
        SlimViT.from_timm(vit)
