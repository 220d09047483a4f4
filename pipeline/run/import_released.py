"""A run directory out of a checkpoint that VTC-LFC's authors' code compressed.

The released file holds the slim model alone. Without the dense one as well there is no `dense.safetensors`: dense top-1
is unknown, and there is nothing to distil; dense MACs and parameters are those of the DeiT that the slim one implies.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.checkpoints.origin import check_pixels
from lowpass.pipeline.checkpoints.released import read_released
from lowpass.pipeline.data.classes import read_class_names
from lowpass.pipeline.data.datasets import Data, len_of, load_data
from lowpass.pipeline.model.architecture import DenseViT, check_blocks
from lowpass.pipeline.model.classes import save_classes
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.dense import untrained_dense
from lowpass.pipeline.run.dense_check import say_preprocessing
from lowpass.pipeline.run.evaluate import measured_top1
from lowpass.pipeline.run.metrics import Figures, Metrics, count_parameters, slim_figures
from lowpass.pipeline.run.readings import check_readings
from lowpass.pipeline.run.recipe import Recipe, make_recipe
from lowpass.pipeline.search.shaping import AS_PUBLISHED


def import_released(
    checkpoint: Path,
    directory: Path,
    qk_scale: float,
    token_cutoff: float,
    dense_checkpoint: Path | None = None,
    data: str | None = None,
    pixels: dict[str, Any] | None = None,
    reading: dict[str, Any] | None = None,
    check: bool = False,
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
        reading: `classes`, a file of names in the order of the logits, and the `ReadingOptions` that differ from the
            usual ones.
        check: refuse a model that is suspiciously bad on the images, see `readings.py`; otherwise it is only said.

    Raises:
        InputError: some input cannot be used; nothing has been written.
    """
    check_empty(directory)
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
        **(reading or {}),
        model=architecture.dense.name,
        released=checkpoint,
        weights=dense_checkpoint,
        data=data,
        token_cutoff=token_cutoff,
        energy_norm=architecture.energy_norm,
        shaping=AS_PUBLISHED,
    )
    names = None if recipe.classes is None else read_class_names(recipe.classes, architecture.dense.num_classes)
    images = None
    if data:
        options = recipe.data_options(names, str(recipe.classes), exact=True).model_copy(update={"cut": False})
        images = load_data(data, architecture, recipe.seed, options)
        names = images.classes
        say_preprocessing(architecture.preprocessing)
        given = {"slim": slim} if dense is None else {"dense": dense} | ({} if dense is slim else {"slim": slim})
        for whose, model in given.items():
            check_readings(model, images, recipe, whose, recipe.classes is not None).insist(go_on=not check)
    slim_top1 = measured_top1(slim, images, recipe.batch_size, "testing slim")
    dense_top1 = slim_top1 if dense is slim else measured_top1(dense, images, recipe.batch_size, "testing dense")
    return save_imported(directory, recipe, slim, dense, (slim_top1, dense_top1), names, images)


def check_empty(directory: Path) -> None:
    """Refuse to write a run where something is.

    Raises:
        InputError: `directory` is a file, or holds some.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise InputError(f"{directory} is not an empty directory; give another --out")


def save_imported(
    directory: Path,
    recipe: Recipe,
    slim: SlimViT,
    dense: SlimViT | None,
    top1: tuple[float | None, float | None],
    names: Sequence[str] | None,
    images: Data | None,
) -> Metrics:
    """Write the run of a slim model that was made elsewhere.

    Args:
        directory: new or empty.
        recipe: what it remembers.
        slim: the model.
        dense: the one it was cut out of; None: nobody has it.
        top1: of slim and dense on `images`, in percent.
        names: of the classes.
        images: that top-1 was measured on.
    """
    stored = dense or untrained_dense(slim.architecture)
    recipe.save(directory)
    if dense is not None:
        dense.save(directory, DENSE_WEIGHTS_FILE)
    slim.save(directory)
    if names is not None:
        save_classes(directory, names)
    metrics = Metrics(
        dense=Figures(
            top1=top1[1],
            macs=stored.architecture.macs(),
            parameters=count_parameters(stored),
            bytes=len(stored.serialised()),
        ),
        slim=slim_figures(slim, top1[0], directory),
        pruned_top1=top1[0],
        data=None if images is None else images.name,
        test_images=None if images is None else len_of(images.test),
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
    check_pixels(pixels)
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
