"""torchvision's vision transformers: its names with a file of weights, or a module in memory."""

from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.converted import Conversion, vit_settings
from lowpass.pipeline.checkpoints.heads import with_head
from lowpass.pipeline.checkpoints.origin import Choices, Origin, mark, set_preprocessing
from lowpass.pipeline.checkpoints.shape import channels_of, fit_positions

NORM_EPS = 1e-6
RENAMES = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)


@dataclass(frozen=True)
class Named:
    """What a name says: width and patch, by which its weights are known, and what they do not tell: the head count, and
    how torchvision preprocesses. `swag`: image sizes that only its SWAG weights have; those see the whole picture,
    resized by `bicubic`."""

    dim: int
    patch: int
    heads: int
    resize: int = 256
    crop: int = 224
    swag: tuple[int, ...] = ()

    def preprocessing(self, side: int) -> dict[str, Any]:
        """What torchvision does with pictures for weights of so many pixels, in timm's words."""
        whole = side in self.swag
        return {
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "crop_pct": 1.0 if whole else self.crop / self.resize,
            "interpolation": "bicubic" if whole else "bilinear",
        }


NAMES = {
    "vit_b_16": Named(768, 16, 12, swag=(384,)),
    "vit_b_32": Named(768, 32, 12),
    "vit_l_16": Named(1024, 16, 16, resize=242, swag=(512,)),
    "vit_l_32": Named(1024, 32, 16),
    "vit_h_14": Named(1280, 14, 16, swag=(224, 518)),
}


def from_torchvision(name: str, heads: int, state: dict[str, Tensor], source: object, choices: Choices) -> nn.Module:
    """A timm ViT with the same logits.

    Args:
        name: one of `NAMES`, or what a module in memory is called.
        heads: in a block.
        state: tensors under torchvision's names.
        source: what messages call the weights.
        choices: of the user.

    Raises:
        InputError: the weights are not torchvision's, or do not fit.
    """
    state = with_head(state, "heads.head", source)
    for key in ("conv_proj.weight", "encoder.pos_embedding", "class_token", "heads.head.weight"):
        if key not in state:
            raise InputError(f"{source} has no {key}, which torchvision's {name} needs; is it a checkpoint of {name}?")
    dim, _, *sides = state["conv_proj.weight"].shape
    patch = (sides[0], sides[1])
    known = NAMES.get(name, Named(dim, patch[0], heads))
    if (dim, *patch) != (known.dim, known.patch, known.patch):
        raise InputError(
            f"{source} has {dim} channels and patches of {patch[0]}x{patch[1]}; {name} has {known.dim} and "
            f"{known.patch}x{known.patch}: another --model"
        )
    layers = {key.split(".")[2] for key in state if key.startswith("encoder.layers.")}
    first = "encoder.layers.encoder_layer_0.mlp."
    hidden = next((len(state[first + mlp]) for mlp in ("0.weight", "linear_1.weight") if first + mlp in state), 4 * dim)
    positions = {"pos_embed": state["encoder.pos_embedding"]}
    side = isqrt(max(positions["pos_embed"].shape[1] - 1, 0))
    own = (side * patch[0], side * patch[1])
    size = fit_positions(positions, Path(str(source)), patch, 1, own, choices.img_size, is_known=True)
    state = state | {"encoder.pos_embedding": positions["pos_embed"]}
    channels = channels_of({"patch_embed.proj.weight": state["conv_proj.weight"]}, Path(str(source)), choices.in_chans)
    classes = len(state["heads.head.weight"])
    settings = vit_settings(size, patch, channels or 3, classes, dim, len(layers), heads, hidden, NORM_EPS)
    model = Conversion(VisionTransformer, settings, RENAMES).built(state, source, name)
    of = " with SWAG's weights" if own[0] in known.swag else ""
    set_preprocessing(model, f"torchvision's {name}{of}", known.preprocessing(own[0]), choices)
    mark(model, Origin())
    return model
