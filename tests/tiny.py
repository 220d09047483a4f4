"""A model that timm makes by name and that a search is through with in a second, for tests of what runs around it."""

from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, register_model

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}


@register_model
def tiny_deit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """For the digits: 64 tokens of 24 channels, 3 blocks of 3 heads."""
    model: VisionTransformer = build_model_with_cfg(VisionTransformer, "tiny_deit", pretrained, **(TINY | kwargs))
    return model
