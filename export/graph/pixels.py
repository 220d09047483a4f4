"""`--input uint8`: the graph takes pixels as cameras and decoders give them, and normalises them itself."""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lowpass.pipeline.model.architecture import Preprocessing


class FromPixels(nn.Module):
    """Pixels [B, H, W, C] uint8 -> the logits of `model`, which takes normalised images [B, C, H, W] FP32."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (1 / (255 * std))[:, None, None])
        self.register_buffer("shift", (-mean / std)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.model(pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift))


def to_pixels(images: NDArray[np.float32], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Normalised images [B, C, H, W] -> pixels [B, H, W, C]; exact for images that came from pixels."""
    mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    pixels = np.clip(np.rint((images * std + mean) * 255), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))


def to_images(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Pixels [B, H, W, C] -> normalised images [B, C, H, W] FP32."""
    mean, std = (np.asarray(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
    images = (pixels.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
