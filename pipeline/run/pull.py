"""A run directory out of a slim model that `SlimViT.save_pretrained` wrote, from a folder or from the hub.

The folder holds the slim model alone: as in a released checkpoint, there is no dense one to compare with or to distil.
"""

from pathlib import Path

from lowpass.pipeline.data.datasets import load_data
from lowpass.pipeline.model.classes import CLASSES_FILE
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.evaluate import measured_top1
from lowpass.pipeline.run.import_released import check_empty, save_imported
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.run.recipe import make_recipe


def pull(source: str, directory: Path, data: str | None = None) -> Metrics:
    """Make a run of a slim model.

    Args:
        source: what `SlimViT.from_pretrained` takes: a folder, or a name on the hub.
        directory: new or empty.
        data: images that the run is to remember, and to be tested on; None: it has no top-1 yet.

    Raises:
        InputError: some input cannot be used; nothing has been written.
    """
    check_empty(directory)
    slim = SlimViT.from_pretrained(source)
    architecture = slim.architecture
    recipe = make_recipe(
        model=architecture.dense.name,
        pulled=source,
        data=data,
        token_cutoff=architecture.token_cutoff,
        energy_norm=architecture.energy_norm,
        token_criterion=architecture.token_criterion,
    )
    names, images = slim.classes, None
    if data:
        options = recipe.data_options(names, CLASSES_FILE, exact=True).model_copy(update={"cut": False})
        images = load_data(data, architecture, recipe.seed, options)
        names = images.classes
    top1 = measured_top1(slim, images, recipe.batch_size, "testing slim")
    return save_imported(directory, recipe, slim, None, (top1, None), names, images)
