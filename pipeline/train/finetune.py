"""Fine-tuning by hard distillation from the dense model (Touvron et al., 2021; weights after VTC-LFC)."""

from typing import Any, cast

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.nn import functional as F

from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.progress import logger, track
from lowpass.pipeline.data.datasets import Data, len_of
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.train.settings import FinetuneSettings

WARMUP = 0.05  # of all steps
CLIP = 1.0  # gradient norm


def finetune(slim: SlimViT, dense: SlimViT | None, data: Data, settings: FinetuneSettings, seed: int) -> SlimViT:
    """The fine-tuned copy of `slim` (moving average of its weights, on the CPU, in evaluation mode).

    The loss is `(1 - w) CE(slim, y) + w CE(slim, argmax dense)`, with w = `distill_weight`. AdamW with layer decay
    (timm), cosine schedule, one process or several (accelerate).

    Args:
        slim: what the search left; it is trained in place, too.
        dense: the teacher; None needs a `distill_weight` of 0.
        data: its `train` split is drawn anew each epoch.
        settings: epochs, rates and weights.
        seed: of the order of images and of what augmentation draws.

    Raises:
        InputError: a label is none of the model's classes.
        ValueError: there is something to distil, but no teacher.
        RunError: the loss stopped being finite.
    """
    if dense is None and settings.distill_weight:
        raise ValueError("distillation needs a teacher")
    images_in_all = len_of(data.train)
    if images_in_all < settings.batch_size:
        logger.info(
            "a batch of %d is more than the %d training images: of that many", settings.batch_size, images_in_all
        )
        settings = settings.model_copy(update={"batch_size": images_in_all})
    accelerator = Accelerator()
    torch.manual_seed(seed)
    loader: Any = data.train_loader(settings.batch_size)
    optimiser: Any = create_optimizer_v2(
        slim.vit,
        opt="adamw",
        lr=settings.lr * settings.batch_size * accelerator.num_processes / 512,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
    )
    model, optimiser, loader = accelerator.prepare(slim, optimiser, loader)
    teacher = dense.to(accelerator.device).eval() if dense is not None and settings.distill_weight else None
    ema = ModelEmaV3(accelerator.unwrap_model(model), decay=settings.ema_decay, use_warmup=True)
    steps = settings.epochs * len(loader)
    schedule = CosineLRScheduler(
        optimiser, t_initial=steps, warmup_t=round(WARMUP * steps), warmup_prefix=True, t_in_epochs=False
    )
    model.train()
    step = skipped = 0
    for epoch in track(range(settings.epochs), "fine-tuning"):
        if hasattr(data.train, "epoch"):
            data.train.epoch = epoch  # new digit scenes
        for batch in loader:
            skipped += settings.batch_size - (0 if batch is None else len(batch[1]))
            if batch is None:
                continue
            images, labels = batch
            if data.classes is None:  # where the classes are known, so are the labels
                data.check_labels(labels)
            logits = model(images)
            loss = (1 - settings.distill_weight) * F.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    target = teacher(images).argmax(-1)
                loss = loss + settings.distill_weight * F.cross_entropy(logits, target)
            if not loss.isfinite():
                raise RunError(f"the fine-tuning loss became {loss.item()} in epoch {epoch}; lower --lr")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimiser.step()
            optimiser.zero_grad()
            step += 1
            schedule.step_update(step)
            ema.update(accelerator.unwrap_model(model), step=step)
    if skipped:
        logger.info("fine-tuning: passed over %d images that cannot be read, in %d epochs", skipped, settings.epochs)
    return cast(SlimViT, ema.module).cpu().eval()
