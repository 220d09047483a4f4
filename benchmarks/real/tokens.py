"""Tokens on their way through frozen blocks, computed once: training of the last blocks starts from them."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import Subset

from lowpass.pipeline.base.files import write_bytes
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.data.datasets import Data, Images

SHARD = 500  # images a file: what a kill costs at most
BATCH = 50


@dataclass(frozen=True)
class Frozen:
    """What frozen blocks make of images: `features` [n, C] FP32, CLS behind the last norm; `labels` [n]; `tokens`
    [n, T, C] FP16 that enter the first block to be trained, None where nobody asked for them. `seconds` it took."""

    features: Tensor
    labels: Tensor
    tokens: Tensor | None
    seconds: float


def frozen_tokens(
    model: Any, data: Data, images: Images, chosen: list[int], block: int | None, folder: Path, name: str
) -> Frozen:
    """Pass images through a frozen ViT; every `SHARD` images are a file of `folder`, which is not computed again.

    Args:
        model: a timm ViT in evaluation mode.
        data: that the images belong to.
        images: one of its splits.
        chosen: which of them, in order.
        block: whose entering tokens are kept, 1 and up; None: none.
        folder: for the files.
        name: of the files.
    """
    parts = list[dict[str, Tensor]]()
    starts = range(0, len(chosen), SHARD)
    for number, start in enumerate(track(starts, f"frozen blocks, {name}, by {SHARD} images")):
        file = folder / f"{name}-{number:04}.safetensors"
        if not file.exists():
            subset = Subset(images, chosen[start : start + SHARD])
            write_bytes(file, save(_shard(model, data, subset, block)))
        parts.append(load(file.read_bytes()))
    whole = {key: torch.cat([part.pop(key) for part in parts]) for key in list(parts[0])}
    return Frozen(whole["features"], whole["labels"], whole.get("tokens"), float(whole["seconds"].sum()))


@torch.inference_mode()
def _shard(model: Any, data: Data, images: Images, block: int | None) -> dict[str, Tensor]:
    start = time.perf_counter()
    found: dict[str, list[Tensor]] = {}
    for batch, labels in data.loader(images, BATCH):
        made = {"labels": labels}
        if block is None:
            last = model.forward_features(batch)
        else:
            last, [(patches, prefix)] = model.forward_intermediates(
                batch, indices=[block - 1], return_prefix_tokens=True, output_fmt="NLC"
            )
            made["tokens"] = torch.cat([prefix, patches], 1).half()
        made["features"] = last[:, 0].contiguous()
        for key, tensor in made.items():
            found.setdefault(key, []).append(tensor)
    seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    return {key: torch.cat(tensors) for key, tensors in found.items()} | {"seconds": seconds}
