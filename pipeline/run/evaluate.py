"""Top-1 of a run's models."""

from pathlib import Path

import torch

from lowpass.pipeline.base.launched import started_together
from lowpass.pipeline.base.processes import processes, sum_over_processes
from lowpass.pipeline.data.datasets import Data, len_of, subset
from lowpass.pipeline.data.streams import StreamImages
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.dense import has_dense
from lowpass.pipeline.run.images import DataSource, run_data
from lowpass.pipeline.run.metrics import Metrics
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.train.evaluate import count_correct, top1


def evaluate_run(directory: Path, data: DataSource) -> Metrics:
    """Measure top-1 of a run's slim model, and of its dense one if it has that, on the test split of `data` (None: the
    run's own). Nothing is written: the images may be others than the run's."""
    recipe, metrics, images = Recipe.load(directory), Metrics.load(directory), run_data(directory, data)
    measured = {}
    for field, file in (("dense", DENSE_WEIGHTS_FILE), ("slim", WEIGHTS_FILE)):
        if field == "dense" and not has_dense(directory):
            continue
        model = SlimViT.load(directory, file)
        accuracy = measured_top1(model, images, recipe.batch_size, f"testing {field}")
        measured[field] = getattr(metrics, field).model_copy(update={"top1": accuracy})
    return metrics.model_copy(update=measured | {"data": images.name, "test_images": len_of(images.test)})


def measured_top1(model: SlimViT | None, data: Data | None, batch_size: int, description: str) -> float | None:
    """Top-1 (percent) on the test split, on a GPU where there is one; None without a model or images. Processes that
    work together share the images among them, but for streams, which each would read whole anyway."""
    if model is None or data is None:
        return None
    if started_together() == 1 or isinstance(data.test, StreamImages):
        return top1(model.to(best_device()), data.loader(data.test, batch_size), description)
    together = processes()
    mine = range(together.process_index, len_of(data.test), together.num_processes)
    batches = data.loader(subset(data.test, mine), batch_size)
    counts = torch.tensor(count_correct(model.to(together.device), batches, description))
    correct, seen = sum_over_processes(counts).tolist()
    return 100 * float(correct) / float(seen)


def best_device() -> torch.device:
    """A GPU where there is one; of processes that work together each has made its own the current one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
