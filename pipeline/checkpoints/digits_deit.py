"""The embedded dense model: a DeiT of 0.68 M parameters that reads digits. `train/digits.py` trained it."""

from pathlib import Path

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

DIGITS_MODEL = "digits_deit"
DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "digits_deit.safetensors"


default_cfgs = generate_default_cfgs(
    {
        "digits_deit.lowpass": {
            "input_size": (3, 32, 32),
            "num_classes": 10,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def digits_deit(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """The embedded DeiT: 32x32 images, patch 4 (64 tokens), 96 channels, 6 blocks of 3 heads, 10 classes."""
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3} | kwargs
    model: VisionTransformer = build_model_with_cfg(VisionTransformer, "digits_deit", pretrained, **settings)
    return model


def initialise_digits_deit(model: VisionTransformer) -> None:
    """2-D sine-cosine positions and Xavier patch embedding: with timm's default initialisation training stalls."""
    with torch.no_grad():
        grid = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim, interleave_sin_cos=True)
        model.pos_embed.zero_()
        model.pos_embed[:, 1:] = grid
        nn.init.xavier_uniform_(model.patch_embed.proj.weight.flatten(1))
