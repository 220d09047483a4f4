"""A teacher that is another model than the dense one: any of timm's, which sees images as it was trained to."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowpass.pipeline.model.architecture import Preprocessing


class ForeignTeacher(nn.Module):
    """Images as the student takes them -> the teacher's logits.

    Pixels are normalised anew, and resized where the teacher takes one size alone and the student another.
    """

    shift: Tensor
    factor: Tensor

    def __init__(self, model: nn.Module, student: Preprocessing) -> None:
        super().__init__()
        self.model = model
        config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        mean, std = (torch.tensor(config[name], dtype=torch.float32)[:, None, None] for name in ("mean", "std"))
        own_mean, own_std = (torch.tensor(values)[:, None, None] for values in (student.mean, student.std))
        self.register_buffer("factor", own_std / std, persistent=False)
        self.register_buffer("shift", (own_mean - mean) / std, persistent=False)
        self.size = fixed_size(model)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]."""
        pixels = images * self.factor + self.shift
        if self.size is not None and pixels.shape[-2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True)
        logits: Tensor = self.model(pixels)
        return logits


def fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width of the images that a timm model takes; None: any."""
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    if not config.get("fixed_input_size"):
        return None
    embed: Any = getattr(model, "patch_embed", None)
    height, width = getattr(embed, "img_size", None) or config["input_size"][1:]
    return int(height), int(width)
