"""Fine-tuning of a ViT's last blocks, norm and head from the tokens that enter them."""

import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from lowpass.benchmarks.real.tokens import Frozen
from lowpass.export.runtimes.cpu import matrix_units
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.files import write_bytes
from lowpass.pipeline.base.progress import logger, track

WARMUP = 0.05  # of all steps
CLIP = 1.0  # gradient norm
STATE = "training.pt"


@dataclass(frozen=True)
class Training:
    """AdamW with a cosine schedule. `kept` is the share of image tokens that a step sees, other ones each time: the
    augmentation that needs no pictures, and it saves time (Liu et al., 2023, PatchDropout)."""

    epochs: int
    lr: float = 3e-4
    batch_size: int = 64
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    kept: float = 0.75


class LastBlocks(nn.Module):
    """The part of a timm ViT from `block` on: entering tokens [B, T, C] -> logits. It shares the model's weights."""

    def __init__(self, model: Any, block: int) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = model.blocks[block:], model.norm, model.head

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, classes], read off CLS."""
        return cast(Tensor, self.head(self.norm(self.blocks(tokens))[:, 0]))


def train_last_blocks(model: Any, block: int, frozen: Frozen, training: Training, folder: Path, seed: int) -> float:
    """Train in place, from where a kill left off: the state is saved after every epoch, and the outcome is the same.

    Args:
        model: a timm ViT with a CLS token and a fitted head.
        block: the first that is trained.
        frozen: training images, with the tokens that enter it.
        training: how.
        folder: for the state.
        seed: of the order of images and of the tokens that are dropped.

    Returns:
        Seconds it took in all.

    Raises:
        RunError: the loss stopped being finite.
    """
    assert frozen.tokens is not None
    last = LastBlocks(model, block).train()
    optimiser: Any = create_optimizer_v2(last, opt="adamw", lr=training.lr, weight_decay=training.weight_decay)
    per_epoch = -(-len(frozen.labels) // training.batch_size)
    steps = training.epochs * per_epoch
    schedule = CosineLRScheduler(
        optimiser, t_initial=steps, warmup_t=round(WARMUP * steps), warmup_prefix=True, t_in_epochs=False
    )
    done, seconds = _resumed(folder / STATE, last, optimiser)
    # Products in BF16 where the CPU has a unit for them; elsewhere they are slower.
    in_bf16 = any(unit.endswith("bf16") for unit in matrix_units())
    for epoch in range(done, training.epochs):
        start, losses = time.perf_counter(), list[float]()
        draw = torch.Generator().manual_seed(seed + epoch)
        said = f"last blocks, epoch {epoch + 1} of {training.epochs}"
        for number, rows in enumerate(track(_batches(frozen, training, draw), said, per_epoch)):
            schedule.step_update(epoch * per_epoch + number)
            tokens = some_tokens(frozen.tokens[rows].float(), training.kept, draw)
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
                logits = last(tokens)
            loss = F.cross_entropy(logits.float(), frozen.labels[rows], label_smoothing=training.label_smoothing)
            if not loss.isfinite():
                raise RunError(f"the loss became {loss.item()} in epoch {epoch + 1}; lower the learning rate")
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(last.parameters(), CLIP)
            optimiser.step()
            losses.append(loss.item())
        seconds += time.perf_counter() - start
        _save(folder / STATE, last, optimiser, epoch + 1, seconds)
        logger.info("%s: loss %.4f", said, sum(losses) / len(losses))
    model.eval()
    return seconds


def some_tokens(tokens: Tensor, kept: float, draw: torch.Generator) -> Tensor:
    """CLS and a share of the image tokens, drawn for each image: [B, 1+N, C] -> [B, 1+round(kept*N), C]."""
    count, images = len(tokens), tokens.shape[1] - 1
    order = torch.rand(count, images, generator=draw).argsort(1)[:, : max(1, round(kept * images))]
    rows = torch.cat([torch.zeros(count, 1, dtype=torch.long), 1 + order], 1)
    return tokens.gather(1, rows[:, :, None].expand(-1, -1, tokens.shape[2]))


def _batches(frozen: Frozen, training: Training, draw: torch.Generator) -> Iterator[Tensor]:
    yield from torch.randperm(len(frozen.labels), generator=draw).split(training.batch_size)


def _save(path: Path, last: LastBlocks, optimiser: Any, epochs: int, seconds: float) -> None:
    content = io.BytesIO()
    state = {"model": last.state_dict(), "optimiser": optimiser.state_dict(), "epochs": epochs, "seconds": seconds}
    torch.save(state, content)
    write_bytes(path, content.getvalue())


def _resumed(path: Path, last: LastBlocks, optimiser: Any) -> tuple[int, float]:
    """Epochs that are done and seconds they took, with the state after them taken up."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    last.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    logger.info("last blocks: going on after epoch %d", state["epochs"])
    return int(state["epochs"]), float(state["seconds"])
