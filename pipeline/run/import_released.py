"""A run directory out of a checkpoint that VTC-LFC's authors' code compressed.

The released file holds the slim model alone. Without the dense one as well there is no `dense.safetensors`: dense top-1
is unknown, and there is nothing to distil; dense MACs and parameters are those of the DeiT that the slim one implies.
"""

from pathlib import Path
from typing import Any

import torch

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.released import read_released
from lowpass.pipeline.data.datasets import load_data
from lowpass.pipeline.model.architecture import DenseViT, check_blocks
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.classes import save_classes
from lowpass.pipeline.run.dense import untrained_dense
from lowpass.pipeline.run.evaluate import measured_top1
from lowpass.pipeline.run.metrics import Figures, Metrics, count_parameters, slim_figures
from lowpass.pipeline.run.recipe import make_recipe
from lowpass.pipeline.search.shaping import AS_PUBLISHED


def import_released(
    checkpoint: Path,
    directory: Path,
    qk_scale: float,
    token_cutoff: float,
    dense_checkpoint: Path | None = None,
    data: str | None = None,
    pixels: dict[str, Any] | None = None,
) -> Metrics:
    """Make a run of a released checkpoint.

    Args:
        checkpoint: slim or dense, see `pipeline/checkpoints/released.py`.
        directory: new or empty.
        qk_scale: what queries are multiplied by.
        token_cutoff: of the low-pass over tokens, in (0, 1).
        dense_checkpoint: of the dense model it was cut out of; a dense `checkpoint` is its own.
        data: images that the run is to remember, and to be tested on; None: it has no top-1 yet.
        pixels: `mean`, `std`, `crop_pct` and `interpolation` that differ from DeiT's, of which the file says nothing.

    Raises:
        InputError: some input cannot be used; nothing has been written.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise InputError(f"{directory} is not an empty directory; give another --out")
    slim = read_released(checkpoint, qk_scale, token_cutoff)
    dense = None
    if dense_checkpoint is not None:
        slim, dense = _pair(slim, read_released(dense_checkpoint, qk_scale, token_cutoff), checkpoint, dense_checkpoint)
    elif slim.architecture.blocks == slim.architecture.dense.blocks():
        dense = slim
    if pixels:
        own = dense is slim
        slim = _with_pixels(slim, pixels)
        dense = slim if own else None if dense is None else _with_pixels(dense, pixels)
    architecture = slim.architecture
    recipe = make_recipe(
        **(pixels or {}),
        model=architecture.dense.name,
        released=checkpoint,
        weights=dense_checkpoint,
        data=data,
        token_cutoff=token_cutoff,
        energy_norm=architecture.energy_norm,
        shaping=AS_PUBLISHED,
    )
    images = load_data(data, architecture, recipe.seed) if data else None
    slim_top1 = measured_top1(slim, images, recipe.batch_size, "testing slim")
    dense_top1 = slim_top1 if dense is slim else measured_top1(dense, images, recipe.batch_size, "testing dense")
    stored = dense or untrained_dense(architecture)
    recipe.save(directory)
    if dense is not None:
        dense.save(directory, DENSE_WEIGHTS_FILE)
    slim.save(directory)
    if images is not None and images.classes is not None:
        save_classes(directory, images.classes)
    metrics = Metrics(
        dense=Figures(
            top1=dense_top1,
            macs=stored.architecture.macs(),
            parameters=count_parameters(stored),
            bytes=len(stored.serialised()),
        ),
        slim=slim_figures(slim, slim_top1, directory),
        pruned_top1=slim_top1,
        data=None if images is None else images.name,
    )
    metrics.save(directory)
    return metrics


def _pair(slim: SlimViT, dense: SlimViT, slim_path: Path, dense_path: Path) -> tuple[SlimViT, SlimViT]:
    """Slim and dense with one description of what they share, layer scale where either has it.

    Raises:
        InputError: the one was not cut out of the other.
    """
    shape, before = dense.blocks[0].shape, dense.architecture.dense
    scaled = before.layer_scale or slim.architecture.dense.layer_scale
    head_dim = None if shape.heads * shape.qk_dim == before.embed_dim else shape.qk_dim
    sizes = {"num_heads": shape.heads, "head_dim": head_dim, "hidden": shape.hidden, "layer_scale": scaled}
    described = before.model_copy(update=sizes)
    if dense.architecture.blocks != described.blocks():
        raise InputError(f"{dense_path} is not a dense model: its blocks differ, or some drop tokens")
    for field, value in slim.architecture.dense.model_copy(update=sizes).model_dump().items():
        if getattr(described, field) != value:
            raise InputError(
                f"{slim_path} was not cut out of {dense_path}: {field} is {value}, not {getattr(described, field)}"
            )
    try:
        check_blocks(slim.architecture.blocks, described)
    except InputError as error:
        raise InputError(f"{slim_path} was not cut out of {dense_path}: {error}") from None
    return _described(slim, described), _described(dense, described)


def _with_pixels(model: SlimViT, pixels: dict[str, Any]) -> SlimViT:
    """The same model for images that are preprocessed otherwise.

    Raises:
        InputError: a mean or a deviation does not fit the model's channels.
    """
    architecture = model.architecture
    for name in ("mean", "std"):
        if name in pixels and len(pixels[name]) != architecture.dense.in_chans:
            channels = architecture.dense.in_chans
            raise InputError(f"--{name} has {len(pixels[name])} values, but the model takes {channels} channels")
    source = architecture.preprocessing.source + "; " + ", ".join("--" + name.replace("_", "-") for name in pixels)
    changed = architecture.preprocessing.model_copy(update=pixels | {"source": source})
    again = SlimViT(architecture.model_copy(update={"preprocessing": changed}))
    again.vit.load_state_dict(model.vit.state_dict())
    return again.eval()


def _described(model: SlimViT, dense: DenseViT) -> SlimViT:
    """The same model by another description; a layer scale it did not have is 1."""
    again = SlimViT(model.architecture.model_copy(update={"dense": dense}))
    ones = {name: torch.ones_like(scale) for name, scale in again.vit.state_dict().items() if name.endswith(".gamma")}
    again.vit.load_state_dict(ones | model.vit.state_dict())
    return again.eval()
