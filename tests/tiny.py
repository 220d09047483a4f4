"""Models that timm makes by name and that a search is through with in a second, for tests of what runs around them."""

from typing import Any

from timm.models import Eva, VisionTransformer, build_model_with_cfg, register_model

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}


@register_model
def tiny_deit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """For the digits: 64 tokens of 24 channels, 3 blocks of 3 heads."""
    model: VisionTransformer = build_model_with_cfg(VisionTransformer, "tiny_deit", pretrained, **(TINY | kwargs))
    return model


ROTARY = {
    **TINY,
    "embed_dim": 36,
    "init_values": 0.1,
    "num_reg_tokens": 2,
    "global_pool": "token",
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_temperature": 100.0,
    "rope_rotate_half": True,
    "dynamic_img_size": True,
}


@register_model
def tiny_dinov3(pretrained: bool = False, **kwargs: Any) -> Eva:
    """The same with rotary positions, heads of 12 channels and two registers, as DINOv3 has them."""
    model: Eva = build_model_with_cfg(Eva, "tiny_dinov3", pretrained, **(ROTARY | kwargs))
    return model


@register_model
def tiny_dinov3_plus(pretrained: bool = False, **kwargs: Any) -> Eva:
    """The same with SwiGLU of 96 hidden channels."""
    gated = ROTARY | {"swiglu_mlp": True, "swiglu_align_to": 8, "mlp_ratio": 8 / 3}
    model: Eva = build_model_with_cfg(Eva, "tiny_dinov3_plus", pretrained, **(gated | kwargs))
    return model
