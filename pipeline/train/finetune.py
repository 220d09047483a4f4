"""Fine-tuning by hard distillation from the dense model (Touvron et al., 2021; weights after VTC-LFC)."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, broadcast
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.processes import on_cpus
from lowpass.pipeline.base.progress import logger, quiet, track
from lowpass.pipeline.data.datasets import Data, len_of
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.train.batches import Batch, batches_from
from lowpass.pipeline.train.drop_path import dropped_paths
from lowpass.pipeline.train.log import Clock, EpochListener
from lowpass.pipeline.train.loss import Mixing, answer_of, distillation_loss, mixing
from lowpass.pipeline.train.settings import FinetuneSettings, MixedPrecision
from lowpass.pipeline.train.state import Best, EmaState, Progress, TrainingState
from lowpass.pipeline.train.tokens import distances

WARMUP = 0.05  # of all steps
CLIP = 1.0  # gradient norm
SAVE_MINUTES = 10.0
Measure = Callable[[SlimViT], float]


class DivergedError(RunError):
    """The loss stopped being finite."""


@dataclass(frozen=True)
class _Training:
    """What accelerate has prepared, and what goes with it."""

    accelerator: Accelerator
    model: Any
    optimiser: Any
    loader: Any
    schedule: CosineLRScheduler
    ema: ModelEmaV3
    best: Best
    teacher: nn.Module | None
    mix: Mixing | None
    accumulated: int  # batches a step
    distance: Callable[[], Tensor] | None = None  # of the tokens of the latest forwards, where they are distilled


def finetune(
    slim: SlimViT,
    teacher: nn.Module | None,
    data: Data,
    settings: FinetuneSettings,
    seed: int,
    state: TrainingState | None = None,
    save_minutes: float = SAVE_MINUTES,
    on_epoch: EpochListener = lambda _epoch: None,
    measure: Measure | None = None,
) -> SlimViT:
    """The fine-tuned copy of `slim` (moving average of its weights, on the CPU, in evaluation mode).

    The loss is `distillation_loss`, with the share `distill_weight` for the teacher's answers, and `token_distillation`
    times the `token_distance`. AdamW with layer decay (timm), cosine schedule, one process or several (accelerate).
    What is drawn depends on seed, epoch and step alone, so that a training that goes on after a kill ends as if there
    had been none.

    Args:
        slim: what the search left; it is trained in place, too.
        teacher: the dense model or another, from images as `slim` takes them to logits; None where nothing is
            distilled. Tokens are the dense model's alone.
        data: its `train` split is drawn anew each epoch.
        settings: epochs, rates and weights.
        seed: of the order of images and of what augmentation draws.
        state: where its state is saved after every epoch, and taken up from if one is there; None: nowhere.
        save_minutes: between two states within an epoch.
        on_epoch: told of each epoch, in the main process.
        measure: top-1 of a model; with `settings.keep_best` the average of the best epoch comes back, not the last.

    Raises:
        InputError: a label is none of the model's classes, the effective batch is no multiple of the batch, the
            precision takes a GPU, or the state is damaged.
        ValueError: there is something to distil, but no teacher; tokens, but another than the dense model; or a best
            to keep, but no measure.
        DivergedError: the loss stopped being finite.
        RunError: the state cannot be saved.
    """
    if teacher is None and settings.distils:
        raise ValueError("distillation needs a teacher")
    if settings.token_distillation and not isinstance(teacher, SlimViT):
        raise ValueError("tokens are distilled from the dense model alone")
    if settings.keep_best and measure is None:
        raise ValueError("the best needs a measure")
    check_precision(settings.mixed_precision)
    settings = _clamped(settings, len_of(data.train))
    training = _prepared(slim, teacher, data, settings, seed)
    with ExitStack() as hooked:  # after the moving average was made, which is to have no hooks
        hooked.enter_context(dropped_paths(slim, settings.drop_path))
        if settings.token_distillation:
            training = replace(training, distance=hooked.enter_context(distances(slim, cast(SlimViT, teacher))))
        unreadable = _train(training, data, settings, seed, state, save_minutes, on_epoch, measure)
    if unreadable:
        logger.info(
            "fine-tuning: passed over %d images that cannot be read, in %d epochs",
            unreadable,
            settings.epochs,
        )
    training.best.restore(training.ema)
    return cast(SlimViT, training.ema.module).cpu().eval()


def _train(
    training: _Training,
    data: Data,
    settings: FinetuneSettings,
    seed: int,
    state: TrainingState | None,
    save_minutes: float,
    on_epoch: EpochListener,
    measure: Measure | None,
) -> int:
    """From wherever it stands to its end; how many images could not be read."""
    accelerator, loader, best = training.accelerator, training.loader, training.best

    def save(progress: Progress) -> None:
        if state is not None:
            with quiet("accelerate"):
                state.save(accelerator, progress)
        clock.saved = time.monotonic()

    progress = state.load(accelerator) if state is not None else Progress()
    done = progress.epoch * len(loader) + progress.step
    training.schedule.step_update(done)
    training.model.train()
    clock = Clock()
    batches = batches_from(progress, loader, settings.epochs, clock)
    for epoch, index, batch, is_last in track(batches, "fine-tuning", settings.epochs * len(loader) - done):
        rate = training.optimiser.param_groups[-1]["lr"]
        loss, distance = _step(training, batch, epoch, index, data, settings, seed)
        there = 0 if batch is None else len(batch[1])
        clock.images += there
        progress = Progress(
            epoch=epoch,
            step=index + 1,
            loss=progress.loss + there * loss,
            distance=progress.distance + there * distance,
            images=progress.images + there,
            unreadable=progress.unreadable + settings.batch_size - there,
        )
        if is_last:
            top1 = None
            if measure is not None and settings.keep_best and (epoch + 1) % settings.keep_best == 0:
                top1 = measure(cast(SlimViT, training.ema.module))
                best.consider(top1, training.ema)
            sums = torch.tensor([progress.loss, progress.images, progress.distance], device=accelerator.device)
            loss_of_all, images_of_all, distance_of_all = accelerator.reduce(sums).tolist()
            apart = distance_of_all if settings.token_distillation else None
            if accelerator.is_main_process:
                on_epoch(clock.epoch(epoch, loss_of_all, images_of_all, rate, accelerator.num_processes, top1, apart))
            progress = Progress(epoch=epoch + 1, unreadable=progress.unreadable)
            save(progress)
            clock.start_epoch()
        elif accelerator.sync_gradients and _as_the_main_process(
            clock.minutes_since_saved() >= save_minutes, accelerator
        ):
            save(progress)
    return progress.unreadable


def _prepared(slim: SlimViT, teacher: nn.Module | None, data: Data, settings: FinetuneSettings, seed: int) -> _Training:
    # One configuration a process is all that accelerate allows, unless its state is reset.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=on_cpus(),
        mixed_precision=settings.mixed_precision or suitable_precision(),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
    )
    at_once = settings.batch_size * accelerator.num_processes
    batch = settings.effective_batch or at_once
    if batch % at_once:
        raise InputError(
            f"--effective-batch {batch} is no multiple of {at_once}, {settings.batch_size} images in each of "
            f"{accelerator.num_processes} processes"
        )
    accelerator.gradient_accumulation_steps = batch // at_once
    loader: Any = data.train_loader(settings.batch_size, seed)
    optimiser: Any = create_optimizer_v2(
        slim.vit,
        opt="adamw",
        lr=settings.lr * batch / 512,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
    )
    model, optimiser, loader = accelerator.prepare(slim, optimiser, loader)
    teacher = teacher.to(accelerator.device).eval() if teacher is not None and settings.distils else None
    ema, best = ModelEmaV3(accelerator.unwrap_model(model), decay=settings.ema_decay, use_warmup=True), Best()
    accelerator.register_for_checkpointing(EmaState(ema), best)
    steps = settings.epochs * len(loader)
    schedule = CosineLRScheduler(
        optimiser, t_initial=steps, warmup_t=round(WARMUP * steps), warmup_prefix=True, t_in_epochs=False
    )
    mix = mixing(settings, slim.architecture.dense.num_classes)
    return _Training(accelerator, model, optimiser, loader, schedule, ema, best, teacher, mix, batch // at_once)


def _step(
    training: _Training, batch: Batch, epoch: int, index: int, data: Data, settings: FinetuneSettings, seed: int
) -> tuple[float, float]:
    """Learn from a batch; its loss, and the distance of its tokens from the dense model's (0: not distilled)."""
    accelerator, length = training.accelerator, len(training.loader)
    step, loss, distance = epoch * length + index, torch.zeros(()), torch.zeros(())
    if batch is not None:
        images, labels = batch
        if data.classes is None:  # where the classes are known, so are the labels
            data.check_labels(labels)
        # Whatever is drawn here, such as dropped paths.
        place = (seed, step, accelerator.process_index)
        torch.manual_seed(seed + step * accelerator.num_processes + accelerator.process_index)
        if training.mix is not None:
            images, labels = training.mix(images, labels, place)
        with accelerator.accumulate(training.model):
            with accelerator.autocast():
                answer = answer_of(training.teacher, images)
            logits = training.model(images)
            loss = distillation_loss(logits, labels, answer, settings.distill_weight, settings.smoothing)
            if training.distance is not None:
                distance = training.distance()
                loss = loss + settings.token_distillation * distance
            if not loss.isfinite():
                raise DivergedError(f"the fine-tuning loss became {loss.item()} in epoch {epoch}; lower --lr")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(training.model.parameters(), CLIP)
            training.optimiser.step()
            training.optimiser.zero_grad()
    elif accelerator.num_processes > 1:
        raise RunError("not one image of a batch can be read, and the other processes wait for it")
    training.schedule.step_update(step + 1)
    if batch is not None and accelerator.sync_gradients:
        updates = epoch * -(-length // training.accumulated) + -(-(index + 1) // training.accumulated)
        training.ema.update(accelerator.unwrap_model(training.model), step=updates)
    return loss.item(), distance.item()


def _clamped(settings: FinetuneSettings, images: int) -> FinetuneSettings:
    """Of no more images a step than there are."""
    if images >= settings.batch_size:
        return settings
    logger.info("a batch of %d is more than the %d training images: of that many", settings.batch_size, images)
    return settings.model_copy(update={"batch_size": images})


def check_precision(precision: MixedPrecision | None) -> None:
    """Refuse FP16 without a GPU: accelerate would train in FP32 and not say so.

    Raises:
        InputError: with what can be had.
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--mixed-precision fp16 takes a GPU, and there is none: give bf16 or no")


def suitable_precision() -> MixedPrecision:
    """BF16 where a GPU has it. CPUs gain little on models of this size, and lose where they have no units for it."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def _as_the_main_process(decision: bool, accelerator: Accelerator) -> bool:
    """The same decision everywhere, whatever clocks say."""
    if accelerator.num_processes == 1:
        return decision
    return bool(broadcast(torch.tensor(int(decision), device=accelerator.device)).item())
