"""Token-level distillation: the tokens that leave the slim model's last block are drawn towards the dense model's.

A slim model's tokens are some of the dense model's. Which ones is known by letting each token's place go the way that
the token itself goes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowpass.pipeline.model.slim_vit import SlimViT

Select = Callable[[Tensor, Tensor, int], Tensor]


@dataclass
class LastTokens:
    """What left the last block in the latest forward: tokens [B, P + keep, C], prefix tokens first, and the places
    [B, P + keep, 1] that they had before the first block."""

    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    places: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def last_tokens(model: SlimViT) -> Iterator[LastTokens]:
    """Note meanwhile what leaves the last block in each forward, before the norm that follows.

    Args:
        model: its sequence of blocks is hooked, as are its blocks' selections; its weights and names stay.
    """
    noted = LastTokens()

    def enter(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        tokens = arguments[0]
        noted.places = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)[..., None]

    def leave(_module: nn.Module, _arguments: object, stream: Tensor) -> None:
        noted.tokens = model.stream.tokens(stream)  # without the places that rotary models carry

    def noting(select: Select) -> Select:
        def selected(tokens: Tensor, scores: Tensor, keep: int) -> Tensor:
            noted.places = select(noted.places, scores, keep)
            return select(tokens, scores, keep)

        return selected

    blocks: nn.Module = model.vit.blocks
    selections = [block.keep_tokens for block in model.blocks]
    hooks = [blocks.register_forward_pre_hook(enter), blocks.register_forward_hook(leave)]
    for block, select in zip(model.blocks, selections, strict=True):
        block.keep_tokens = noting(select)
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
        for block, select in zip(model.blocks, selections, strict=True):
            block.keep_tokens = select


def token_distance(tokens: Tensor, places: Tensor, dense: Tensor) -> Tensor:
    """How far a slim model's tokens are from the dense model's in the same places: their squared distance, divided by
    the squared length of the dense model's, `|s - d|^2 / |d|^2` over all of an image's tokens and channels; the mean
    over images. 0: they are the same; 1: as far as tokens that are all zero.

    By image, so that an image counts the same whatever shares its batch. The division makes one weight mean the same
    for residual streams of any size.

    Args:
        tokens: the slim model's [B, P + keep, C].
        places: theirs among the dense model's [B, P + keep, 1].
        dense: the dense model's [B, P + N, C].

    Returns:
        A scalar in FP32.
    """
    aim = dense.gather(1, places.expand(-1, -1, dense.shape[2])).float()
    off = (tokens.float() - aim).square().sum((1, 2))
    return (off / aim.square().sum((1, 2))).mean()


@contextmanager
def distances(student: SlimViT, dense: SlimViT) -> Iterator[Callable[[], Tensor]]:
    """`token_distance` of the latest forwards of both, which must have been of the same images.

    Args:
        student: whose tokens are drawn.
        dense: the model that it was cut from, with all its tokens.

    Raises:
        ValueError: `dense` drops tokens.
    """
    if any(block.scores_tokens for block in dense.blocks):
        raise ValueError("tokens are distilled from a model that keeps them all")
    with last_tokens(student) as ours, last_tokens(dense) as theirs:
        yield lambda: token_distance(ours.tokens, ours.places, theirs.tokens)
