"""A run directory out of a checkpoint that VTC-LFC's authors' code compressed.

The released file holds the slim model alone. Without the dense one as well there is no `dense.safetensors`: dense top-1
is unknown, and there is nothing to distil; dense MACs and parameters are those of the DeiT that the slim one implies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.checkpoints.released import read_released
from lowpass.pipeline.data.datasets import Data, load_data
from lowpass.pipeline.model.architecture import Architecture, DenseViT, check_blocks
from lowpass.pipeline.model.slim import ARCHITECTURE_FILE, DENSE_WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.metrics import Figures, Metrics, count_parameters, slim_figures
from lowpass.pipeline.run.recipe import Recipe, make_recipe
from lowpass.pipeline.run.run import best_device, has_dense
from lowpass.pipeline.search.shaping import AS_PUBLISHED
from lowpass.pipeline.train.evaluate import top1


def import_released(
    checkpoint: Path,
    directory: Path,
    qk_scale: float,
    token_cutoff: float,
    dense_checkpoint: Path | None = None,
    data: str | None = None,
) -> Metrics:
    """Make a run of a released checkpoint.

    Args:
        checkpoint: slim or dense, see `pipeline/checkpoints/released.py`.
        directory: new or empty.
        qk_scale: what queries are multiplied by.
        token_cutoff: of the low-pass over tokens, in (0, 1).
        dense_checkpoint: of the dense model it was cut out of; a dense `checkpoint` is its own.
        data: images that the run is to remember, and to be tested on; None: it has no top-1 yet.

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
    architecture = slim.architecture
    recipe = make_recipe(
        model=architecture.dense.name,
        released=checkpoint,
        weights=dense_checkpoint,
        data=data,
        token_cutoff=token_cutoff,
        energy_norm=architecture.energy_norm,
        shaping=AS_PUBLISHED,
    )
    images = load_data(data, architecture, recipe.seed) if data else None
    slim_top1 = _tested(slim, images, recipe.batch_size, "testing slim")
    dense_top1 = slim_top1 if dense is slim else _tested(dense, images, recipe.batch_size, "testing dense")
    stored = dense or untrained_dense(architecture)
    recipe.save(directory)
    if dense is not None:
        dense.save(directory, DENSE_WEIGHTS_FILE)
    slim.save(directory)
    metrics = Metrics(
        dense=Figures(
            top1=dense_top1,
            macs=stored.architecture.macs(),
            parameters=count_parameters(stored),
            bytes=len(stored.serialised()),
        ),
        slim=slim_figures(slim, slim_top1, directory),
        pruned_top1=slim_top1,
    )
    metrics.save(directory)
    return metrics


def untrained_dense(architecture: Architecture) -> SlimViT:
    """The dense model of an architecture with random weights, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SlimViT(architecture.model_copy(update={"blocks": architecture.dense.blocks()})).eval()


@contextmanager
def dense_run(directory: Path) -> Iterator[Path]:
    """A run that holds the dense weights of the run in `directory`: that run itself, or where it has none a temporary
    one with random weights, which take as long."""
    if has_dense(directory):
        yield directory
        return
    console.print(f"{directory} has no dense weights: dense is timed with random ones")
    dense = untrained_dense(SlimViT.load(directory).architecture)
    with TemporaryDirectory() as folder:
        stand_in = Path(folder)
        Recipe(
            model=dense.architecture.dense.name, random_weights=True, architecture=directory / ARCHITECTURE_FILE
        ).save(stand_in)
        dense.save(stand_in)
        dense.save(stand_in, DENSE_WEIGHTS_FILE)
        yield stand_in


def _tested(model: SlimViT | None, data: Data | None, batch_size: int, description: str) -> float | None:
    if model is None or data is None:
        return None
    return top1(model.to(best_device()), data.loader(data.test, batch_size), description)


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


def _described(model: SlimViT, dense: DenseViT) -> SlimViT:
    """The same model by another description; a layer scale it did not have is 1."""
    again = SlimViT(model.architecture.model_copy(update={"dense": dense}))
    ones = {name: torch.ones_like(scale) for name, scale in again.vit.state_dict().items() if name.endswith(".gamma")}
    again.vit.load_state_dict(ones | model.vit.state_dict())
    return again.eval()
