"""Top-1 of what is deployed: an exported file or an engine in its own runtime."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lowpass.export.artefacts import open_session
from lowpass.export.options import Precision
from lowpass.export.runtimes.engine import FLAVOURS
from lowpass.export.runtimes.registry import SUPPORTED, RuntimeName, default_precision, missing
from lowpass.export.runtimes.session import Images, Session, logits_of
from lowpass.export.tensorrt.plan import current_plan, plan_path
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.run.images import DataSource, run_data
from lowpass.pipeline.run.recipe import Recipe


class Deployed(BaseModel):
    """Top-1 (percent) of a run's slim model as one runtime computes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: RuntimeName
    precision: Precision
    images: int
    top1: float


def evaluate_deployed(
    directory: Path, runtime: RuntimeName, precision: Precision | None = None, data: DataSource = None
) -> Deployed:
    """Run the exported slim model on every test image of `data` (None: the run's own), a batch at a time.

    Args:
        directory: the run, exported (and built, for TensorRT).
        runtime: where it runs.
        precision: None for the one the runtime is benchmarked in.
        data: see above.

    Raises:
        InputError: the runtime is missing or lacks the precision, or its file is missing or stale; or there are no
            images.
    """
    precision = precision or default_precision(runtime)
    session, images = open_session(runtime, directory, precision), run_data(directory, data)
    size, least = Recipe.load(directory).batch_size, 1
    if runtime in FLAVOURS:
        profile = current_plan(directory, precision, runtime)[1].profile
        size, least = min(max(size, profile.least), profile.most), profile.least
    batches = track(images.loader(images.test, size), f"testing {runtime} {precision}")
    correct, seen = count_right(session, batches, least)
    if not seen:
        raise InputError(f"{images.name} holds no test images")
    return Deployed(runtime=runtime, precision=precision, images=seen, top1=100 * correct / seen)


def count_right(session: Session, batches: Iterable[tuple[Tensor, Tensor]], least: int = 1) -> tuple[int, int]:
    """How many of the images [B, C, H, W] a session puts into their class [B], and how many there are; `least` as in
    `logits_of_part`."""
    correct = seen = 0
    for images, labels in batches:
        predicted = logits_of_part(session, images.numpy(), least).argmax(-1)
        correct += int((predicted == labels.numpy()).sum())
        seen += len(labels)
    return correct, seen


def logits_of_part(session: Session, images: Images, least: int) -> Images:
    """Logits [B, classes] of a batch that may be smaller than the `least` an engine takes, as the last one of a
    data set is: its last image is repeated then."""
    filling = np.repeat(images[-1:], max(0, least - len(images)), 0)
    return logits_of(session, np.concatenate([images, filling]))[: len(images)]


def runnable_engines(directory: Path) -> list[tuple[RuntimeName, Precision]]:
    """The run's engines that are current and can run here."""
    found = list[tuple[RuntimeName, Precision]]()
    for flavour in FLAVOURS:
        if missing(flavour) is not None:
            continue
        for precision in SUPPORTED[flavour]:
            try:
                if plan_path(directory, precision).exists() and current_plan(directory, precision, flavour):
                    found.append((flavour, precision))
            except InputError:  # of another GPU, version or export: not what would be deployed here
                continue
    return found
