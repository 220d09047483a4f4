"""Pictures of the tokens that stay: what each stage of a slim model no longer looks at is painted over."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.data.datasets import MODES, transforms
from lowpass.pipeline.data.pictures import as_mode, open_picture
from lowpass.pipeline.method.token_scores import kept_indices
from lowpass.pipeline.model.architecture import Architecture
from lowpass.pipeline.model.slim_vit import SlimViT

PAINT = np.array([0.86, 0.34, 0.14])  # over dropped patches: neither black nor white, which pictures have
SHINES_THROUGH = 0.25  # share of a dropped patch
GAP = 4  # pixels between pictures
SIDE = 224  # pixels that the shorter side of a picture is drawn with, at least


def show_tokens(model: SlimViT | Path | str, images: Sequence[Path | str | Image.Image]) -> Image.Image:
    """Draw which patches stay: a row a picture, first whole as the model sees it, then after each block that drops.

    Args:
        model: a slim model, or the run directory that holds one.
        images: files or Pillow images, any size; they are preprocessed as the model expects.

    Raises:
        InputError: a file cannot be read, there is no run or no image, or the model drops no tokens.

    Example:
        >>> slim = SlimViT.from_timm(load_model("digits_deit"))  # doctest: +SKIP
        >>> slim.set_keep(2, 40)  # doctest: +SKIP
        >>> show_tokens(slim, ["photo.jpg"]).save("tokens.png")  # doctest: +SKIP
    """
    slim = model if isinstance(model, SlimViT) else SlimViT.load(model)
    architecture = slim.architecture
    mode = MODES[architecture.dense.in_chans]
    _, plain = transforms(architecture)
    opened = [
        as_mode(image, mode) if isinstance(image, Image.Image) else open_picture(Path(image), mode) for image in images
    ]
    if not opened:
        raise InputError("give at least one image to show the tokens of")
    seen = torch.stack([plain(image) for image in opened])
    stages = kept_tokens(slim, seen)
    if not stages:
        raise InputError(f"{architecture.dense.name} drops no tokens here: there is nothing to show")
    masks = [torch.ones_like(stages[0][1]), *(kept for _, kept in stages)]
    pictures = pixels_of(seen, architecture)
    rows = [[_painted(picture, mask[row], architecture) for mask in masks] for row, picture in enumerate(pictures)]
    return _sheet(rows)


@torch.inference_mode()
def kept_tokens(slim: SlimViT, images: Tensor) -> list[tuple[int, Tensor]]:
    """Which tokens of the image each block that drops some passes on.

    Args:
        slim: on any device.
        images: [B, C, H, W], normalised.

    Returns:
        The block's index and a mask [B, N] over the image's tokens, from the bottom, on the CPU.
    """
    prefix, stages = slim.architecture.dense.num_prefix_tokens, []
    tokens = slim.embed(images.to(next(slim.parameters()).device))
    alive = torch.arange(tokens.shape[1] - prefix, device=tokens.device).expand(len(tokens), -1)
    for index, block in enumerate(slim.blocks):
        if block.scores_tokens:
            alive = alive.gather(1, kept_indices(block.scores(*block.mix(tokens)), block.keep))
            mask = torch.zeros(len(tokens), slim.architecture.dense.num_tokens, dtype=torch.bool, device=alive.device)
            stages.append((index, mask.scatter(1, alive, True).cpu()))
        tokens = block(tokens)
    return stages


def pixels_of(images: Tensor, architecture: Architecture) -> list[np.ndarray]:
    """Images [B, C, H, W] as pictures [H, W, 3] in 0..1, the normalisation undone."""
    prep = architecture.preprocessing
    mean, std = (torch.tensor(values)[:, None, None] for values in (prep.mean, prep.std))
    pixels = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    return [np.broadcast_to(picture.numpy(), (*picture.shape[:2], 3)) for picture in pixels]


def _painted(picture: np.ndarray, kept: Tensor, architecture: Architecture) -> Image.Image:
    dense = architecture.dense
    (height, width), (rows, columns) = (
        dense.patch_size,
        (side // patch for side, patch in zip(dense.img_size, dense.patch_size, strict=True)),
    )
    mask = kept.reshape(rows, columns).numpy().repeat(height, 0).repeat(width, 1)
    seen = picture[: mask.shape[0], : mask.shape[1]]
    drawn = np.where(mask[..., None], seen, SHINES_THROUGH * seen + (1 - SHINES_THROUGH) * PAINT)
    image = Image.fromarray(np.rint(255 * drawn).astype(np.uint8))
    times = max(1, -(-SIDE // min(image.size)))
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)


def _sheet(rows: list[list[Image.Image]]) -> Image.Image:
    width, height = (side + GAP for side in rows[0][0].size)
    sheet = Image.new("RGB", (width * len(rows[0]) - GAP, height * len(rows) - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    return sheet
