"""A run's slim model, fine-tuned in its place; the searched weights stay beside it."""

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import remove_parts, write_bytes
from lowpass.pipeline.base.processes import processes
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.data.datasets import Data, len_of, subset
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, WEIGHTS_FILE, SlimViT
from lowpass.pipeline.run.dense import has_dense
from lowpass.pipeline.run.evaluate import measured_top1
from lowpass.pipeline.run.images import DataSource, run_data
from lowpass.pipeline.run.metrics import Metrics, slim_figures
from lowpass.pipeline.run.readings import check_readings
from lowpass.pipeline.run.recipe import Recipe
from lowpass.pipeline.run.teacher import foreign_teacher, teacher_files
from lowpass.pipeline.run.tracking import both, tracker
from lowpass.pipeline.train.evaluate import top1
from lowpass.pipeline.train.finetune import SAVE_MINUTES, DivergedError, check_precision, finetune
from lowpass.pipeline.train.log import TrainingLog
from lowpass.pipeline.train.settings import FinetuneSettings, Tracker, finetune_settings
from lowpass.pipeline.train.state import TrainingState

PRUNED_WEIGHTS_FILE = "pruned.safetensors"  # what the search left


class Asked(BaseModel):
    """What a training was asked for. `weights`: the file that it began from; `teacher_files`: SHA-256 of those that its
    teacher was read from, by name; `before`: the run's figures then, on its images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: FinetuneSettings
    seed: int
    data: str
    images: int
    processes: int
    weights: str
    teacher_files: dict[str, str]
    before: Metrics


def finetune_run(
    directory: Path,
    data: DataSource,
    changes: dict[str, Any],
    seed: int | None,
    resume: bool = False,
    restart: bool = False,
    save_minutes: float = SAVE_MINUTES,
    track: Tracker | None = None,
    check: bool = False,
) -> Metrics:
    """Distil the dense model, or the settings' `teacher`, into the slim one and save it in its place. A run imported
    without its dense model, and given no other teacher, is trained on the labels alone.

    Args:
        directory: a run.
        data: None for the run's own.
        changes: settings that differ from the recipe's, or else from those that suit the data.
        seed: None for the run's own.
        resume: go on with a training that was interrupted; begin one where none was; leave alone one that has ended.
        restart: begin from the searched weights, whatever was trained since.
        save_minutes: between two states within an epoch.
        track: where epochs are shown, too; None: in `training.csv` alone.
        check: refuse other images than the run's on which its dense model is suspiciously bad, see `readings.py`;
            otherwise it is only said.

    Raises:
        InputError: a setting is out of range, the data or the teacher does not fit, the tracker is not installed, or
            there is an interrupted training of which nothing was said, or that was asked for something else.
        RunError: training diverged, or its state cannot be saved; the run is as it was.
    """
    if resume and restart:
        raise InputError("--resume goes on with a training, --restart begins anew: give one of them")
    state, together = TrainingState(directory), processes()
    begun = state.begun and not restart
    if begun and not resume:
        raise InputError(
            f"a training of {directory} was interrupted: --resume goes on with it, --restart begins anew from the "
            "weights that the search left"
        )
    together.wait_for_everyone()  # before the first of them writes
    if resume and not begun and (trained := Metrics.load(directory)).finetuned_epochs:
        logger.info("the training of %s has ended: nothing to go on with; without --resume it is trained on", directory)
        if together.is_main_process:
            state.remove()  # a kill may have left its folder
            remove_parts(directory)
        return trained
    recipe = Recipe.load(directory)
    dense = SlimViT.load(directory, DENSE_WEIGHTS_FILE) if has_dense(directory) else None
    has_teacher = (changes.get("teacher") or (recipe.finetune and recipe.finetune.teacher)) is not None
    if dense is None and not has_teacher:
        if changes.get("distill_weight") or changes.get("token_distillation"):
            raise InputError(
                f"{directory} has no dense model to distil; import it with --dense CHECKPOINT, or give a --teacher"
            )
        logger.info("no dense model to distil: training on the labels alone")
        changes = changes | {"distill_weight": 0.0, "token_distillation": 0.0}
    images = run_data(directory, data)
    if begun:
        asked = _taken_up(directory, state, changes, seed, images)
        slim = SlimViT.load(directory, asked.weights)
    else:
        metrics, weights = _start(directory, restart)
        slim = SlimViT.load(directory, weights)
        if metrics.data not in (None, images.name):
            whose = ("slim", slim) if dense is None else ("dense", dense)
            check_readings(whose[1], images, recipe, whose[0], are_named=True, is_run=True).insist(go_on=not check)
        settings = finetune_settings(images.name, changes, recipe.finetune)
        check_precision(settings.mixed_precision)  # before anything is written
        asked = Asked(
            settings=settings,
            seed=recipe.seed if seed is None else seed,
            data=images.name,
            images=len_of(images.train),
            processes=together.num_processes,
            weights=weights,
            teacher_files=teacher_files(directory, settings),
            before=_on_these_images(metrics, dense, slim, images, recipe.batch_size),
        )
    teacher = _teacher(asked, slim, dense, images, recipe.batch_size)
    tracked = tracker(track, directory, asked.settings) if track is not None and together.is_main_process else None
    if together.is_main_process:
        remove_parts(directory)  # also of a kill in the making of the result, after which the training goes on
        if not begun:
            if not asked.before.finetuned_epochs:
                write_bytes(directory / PRUNED_WEIGHTS_FILE, (directory / asked.weights).read_bytes())
            state.begin(asked)
    together.wait_for_everyone()
    log = TrainingLog(directory, asked.settings.epochs)
    held_in = subset(images.calibration, _held_in(images, recipe)) if asked.settings.keep_best else None

    def measure(model: SlimViT) -> float:
        assert held_in is not None
        return top1(model, images.loader(held_in, recipe.batch_size), "measuring")

    try:
        on_epoch = log if tracked is None else both(log, tracked)
        slim = finetune(slim, teacher, images, asked.settings, asked.seed, state, save_minutes, on_epoch, measure)
    except DivergedError:
        if together.is_main_process:
            state.remove()  # it would diverge again
        raise
    finally:
        if tracked is not None:
            tracked.finish()
    accuracy = measured_top1(slim, images, recipe.batch_size, "testing slim")
    if together.is_main_process:
        slim.save(directory)
        metrics = asked.before.model_copy(
            update={
                "slim": slim_figures(slim, accuracy, directory),
                "finetuned_epochs": asked.before.finetuned_epochs + asked.settings.epochs,
            }
        )
        metrics.save(directory)
        state.remove()
    together.wait_for_everyone()
    return Metrics.load(directory)


def _teacher(asked: Asked, slim: SlimViT, dense: SlimViT | None, images: Data, batch_size: int) -> nn.Module | None:
    """What is distilled."""
    settings = asked.settings
    if settings.teacher is None or not settings.distill_weight:
        return dense
    return foreign_teacher(
        settings.teacher, settings.teacher_weights, slim.architecture, images, batch_size, asked.seed
    )


def _held_in(images: Data, recipe: Recipe) -> list[int]:
    """Places of training images, plain, that epochs are compared on: as many as a search measures."""
    drawn = torch.randperm(len_of(images.calibration), generator=torch.Generator().manual_seed(recipe.seed))
    return drawn[: recipe.measure_images].tolist()


def _start(directory: Path, restart: bool) -> tuple[Metrics, str]:
    """The run's figures and the file of the weights that a training begins from.

    Raises:
        InputError: the searched weights are asked for, and not kept.
    """
    metrics = Metrics.load(directory)
    if not restart or not metrics.finetuned_epochs:
        return metrics, WEIGHTS_FILE
    if not (directory / PRUNED_WEIGHTS_FILE).exists():
        raise InputError(f"{directory} was fine-tuned before searched weights were kept; leave --restart out")
    slim = metrics.slim.model_copy(update={"top1": metrics.pruned_top1})
    return metrics.model_copy(update={"slim": slim, "finetuned_epochs": 0}), PRUNED_WEIGHTS_FILE


def _taken_up(directory: Path, state: TrainingState, changes: dict[str, Any], seed: int | None, images: Data) -> Asked:
    """What the interrupted training was asked for; what is asked for now must be the same, and so must the teacher.

    Raises:
        InputError: it is not; the message names what differs.
    """
    try:
        asked = Asked.model_validate_json(state.asked())
    except ValidationError:
        raise InputError(f"{state.folder} is damaged; --restart begins anew") from None
    now = asked.settings.model_dump() | changes
    differing = [(name, asked.settings.model_dump()[name], value) for name, value in now.items()]
    differing += [
        ("seed", asked.seed, asked.seed if seed is None else seed),
        ("data", asked.data, images.name),
        ("training images", asked.images, len_of(images.train)),
        ("processes", asked.processes, processes().num_processes),
    ]
    for name, before, value in differing:
        if before != value:
            raise InputError(
                f"the interrupted training in {state.folder} has {name} = {before}, now it is {value}; leave it as it "
                "was, or --restart"
            )
    files = teacher_files(directory, asked.settings)
    for name in sorted(asked.teacher_files.keys() | files.keys()):
        was, is_now = asked.teacher_files.get(name), files.get(name)
        if was != is_now:
            raise InputError(
                f"the interrupted training in {state.folder} has a teacher whose file {name} was {_digest(was)}, now "
                f"it is {_digest(is_now)}; put it back as it was, or --restart"
            )
    return asked


def _digest(sha: str | None) -> str:
    """Of a file, as said in an error."""
    return "not there" if sha is None else f"SHA-256 {sha[:16]}..."


def _on_these_images(metrics: Metrics, dense: SlimViT | None, slim: SlimViT, images: Data, batch_size: int) -> Metrics:
    """The run's figures, measured anew where they are of other images: figures that stand side by side are measured on
    the same."""
    update: dict[str, Any] = {"data": images.name, "test_images": len_of(images.test)}
    if metrics.data not in (None, images.name):
        logger.info("testing on %s from here on: the run's figures were of %s", images.name, metrics.data)
        dense_top1 = measured_top1(dense, images, batch_size, "testing dense")
        update["dense"] = metrics.dense.model_copy(update={"top1": dense_top1})
        update["pruned_top1"] = measured_top1(slim, images, batch_size, "testing slim before")
    return metrics.model_copy(update=update)
