"""One small model of every family of plain ViTs and of those with rotary positions, and the count of timm's models that
are taken."""

from collections import defaultdict
from functools import cache, partial
from typing import Any

import timm
import torch
from timm.layers import DiffAttention, GELUTanh, GluMlp, QuickGELU, SwiGLU, SwiGLUPacked
from timm.models import Eva, get_pretrained_cfg, model_entrypoint, split_model_name_tag
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.from_timm import describe_dense
from lowpass.pipeline.model.readout import TokenAndMeanEva, TokenAndMeanViT

CLIP = {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
GAP = {"class_token": False, "global_pool": "avg"}
DIFFERENTIAL = GAP | {"reg_tokens": 1, "init_values": 0.5, "attn_layer": DiffAttention, "no_embed_class": True}
# Name -> what timm's `VisionTransformer` is told beside the size of a small one, and a model of timm's that is like it.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "ViT, DeiT": ({}, "deit_small_patch16_224"),
    "DeiT distilled": ({"kind": VisionTransformerDistilled}, "deit_small_distilled_patch16_224"),
    "DeiT III: layer scale, no class position": (
        {"init_values": 0.5, "no_embed_class": True},
        "deit3_small_patch16_224",
    ),
    "CLIP: a norm before the blocks": (CLIP, "vit_base_patch16_clip_224"),
    "CLIP with QuickGELU": (CLIP | {"act_layer": QuickGELU}, "vit_base_patch16_clip_quickgelu_224"),
    "tanh GELU": ({"act_layer": GELUTanh}, "vit_so400m_patch14_siglip_378"),
    "no bias on query, key and value": ({"qkv_bias": False}, "vit_base_patch16_224_miil"),
    "registers": ({"reg_tokens": 3}, "vit_small_patch14_reg4_dinov2"),
    "MAE, EVA: averages, with CLS": ({"global_pool": "avg"}, "eva_large_patch14_196"),
    "averages, no CLS": (GAP, "vit_so400m_patch14_siglip_gap_378"),
    "averages, the norm before": (GAP | {"fc_norm": False, "qkv_bias": False}, "vit_medium_patch16_gap_256"),
    "averages, registers, no CLS": (
        GAP | {"reg_tokens": 2, "init_values": 0.5, "no_embed_class": True},
        "vit_betwixt_patch16_reg4_gap_256",
    ),
    "BEiT-3: norms inside the block": (
        {"scale_attn_norm": True, "scale_mlp_norm": True, "global_pool": "avg"} | CLIP | {"pre_norm": False},
        "beit3_base_patch16_224",
    ),
    "a learned query pools": ({"class_token": False, "global_pool": "map"}, "vit_so400m_patch14_siglip_378"),
    "differential attention": (DIFFERENTIAL, "vit_dlittle_patch16_reg1_gap_256"),
    "SwiGLU, gate and value in one layer": (
        {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 0.5, "reg_tokens": 2, "mlp_ratio": 16 / 3},
        "vit_giant_patch14_reg4_dinov2",
    ),
    "a gated MLP, its gate last": ({"mlp_layer": GluMlp, "mlp_ratio": 8.0}, "(none)"),
    "any size, fixed at one": ({"dynamic_img_size": True}, "test_vit"),
    "DINOv2's linear head: CLS and average": ({"kind": TokenAndMeanViT, "init_values": 0.5}, "(Hugging Face)"),
    "DINOv2's linear head behind SwiGLU": (
        {"kind": TokenAndMeanViT, "init_values": 0.5, "mlp_layer": SwiGLU, "act_layer": nn.SiLU},
        "(Hugging Face)",
    ),
}
AXIAL = {"kind": Eva, "use_rot_pos_emb": True}
ROPE_VIT = AXIAL | {
    "attn_type": "rope",
    "init_values": 0.5,
    "global_pool": "token",
    "rope_grid_indexing": "xy",
    "rope_temperature": 100.0,
}
DINOV3 = AXIAL | {
    "rope_type": "dinov3",
    "rope_temperature": 100.0,
    "rope_rotate_half": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 3,
    "use_fc_norm": False,
    "init_values": 0.5,
    "dynamic_img_size": True,
    "norm_layer": partial(nn.LayerNorm, eps=1e-5),
}
# The same for timm's `Eva` with rotary positions.
ROTARY: dict[str, tuple[dict[str, Any], str]] = {
    "DINOv3": (DINOV3 | {"qkv_bias": False}, "vit_small_patch16_dinov3"),
    "DINOv3 with biases, reads CLS": (DINOV3 | {"global_pool": "token"}, "vit_small_patch16_dinov3_qkvb"),
    "DINOv3's linear head: CLS and average": (
        DINOV3 | {"kind": TokenAndMeanEva, "global_pool": "token"},
        "(Hugging Face)",
    ),
    "RoPE-ViT": (ROPE_VIT | {"use_abs_pos_emb": False}, "vit_small_patch16_rope_224"),
    "RoPE-ViT with learned positions": (ROPE_VIT | {"no_embed_class": True}, "vit_small_patch16_rope_ape_224"),
    "rotary, averages, registers, no CLS": (
        AXIAL | GAP | {"num_reg_tokens": 2, "init_values": 0.5, "use_abs_pos_emb": False, "ref_feat_shape": (3, 5)},
        "vit_medium_patch16_rope_reg1_gap_256",
    ),
    "Perception Encoder: spatial, language": (
        AXIAL
        | {"attn_type": "rope", "use_pre_transformer_norm": True, "use_post_transformer_norm": False}
        | {"use_fc_norm": False, "ref_feat_shape": (8, 8), "rope_grid_offset": 1.0, "rope_grid_indexing": "xy"},
        "vit_pe_spatial_small_patch16_512",
    ),
    "rotary, query, key and value apart": (AXIAL | {"qkv_fused": False}, "(none)"),
    "EVA-02: SwiGLU": (AXIAL | {"swiglu_mlp": True, "ref_feat_shape": (6, 6)}, "eva02_tiny_patch14_336"),
    "DINOv3 plus: SwiGLU": (
        DINOV3 | {"swiglu_mlp": True, "swiglu_align_to": 8, "qkv_bias": False},
        "vit_small_plus_patch16_dinov3",
    ),
}
FILES = ("timm.models.vision_transformer", "timm.models.deit")


def rotary_models() -> list[str]:
    """timm's architectures of its `eva` file that have rotary positions."""
    names = []
    for name in timm.list_models(module="eva"):
        with torch.device("meta"):
            model: Any = timm.create_model(name, num_classes=1000)
        if getattr(model, "rope", None) is not None:
            names.append(name)
    return names


def refused_rotary() -> tuple[int, dict[str, list[str]]]:
    """How many of them there are, and by reason those that are refused. They are given a classifier: most are trained
    without one."""
    reasons = defaultdict(list)
    names = rotary_models()
    for name in names:
        if reason := reason_against(name):
            reasons[reason].append(name)
    return len(names), dict(reasons)


def pretrained_classifiers() -> list[str]:
    """timm's pretrained models of these two files that have a classifier."""
    names = []
    for name in timm.list_pretrained():
        entrypoint = model_entrypoint(split_model_name_tag(name)[0])
        config = get_pretrained_cfg(name)
        if entrypoint.__module__ in FILES and config is not None and config.num_classes:
            names.append(name)
    return names


def refused() -> tuple[int, dict[str, list[str]]]:
    """How many of them there are, and by reason those that are refused. Nothing is downloaded."""
    reasons = defaultdict(list)
    names = pretrained_classifiers()
    for name in names:
        if reason := reason_against(split_model_name_tag(name)[0]):
            reasons[reason].append(name)
    return len(names), dict(reasons)


@cache
def reason_against(architecture: str) -> str:
    """Why an architecture is refused, or nothing. A tag changes its weights and classes, not its parts."""
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=1000)
    try:
        describe_dense(model)
    except InputError as error:
        return str(error).split(": ", 1)[1].split(";")[0]
    return ""


if __name__ == "__main__":
    for what, (count, reasons) in {"pretrained classifiers": refused(), "rotary": refused_rotary()}.items():
        print(f"{what}: {count - sum(map(len, reasons.values()))} of {count} are accepted")
        for reason, models in reasons.items():
            print(f"  {reason}: {len(models)}, {', '.join(models)}")
