"""What the rivals share: which models they take, and MACs counted as the slim model's are."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from timm.models import VisionTransformer

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.method.channels import ChannelChoice
from lowpass.pipeline.model.architecture import DenseViT
from lowpass.pipeline.model.from_timm import describe_dense
from lowpass.pipeline.model.slim_block import SlimBlock
from lowpass.pipeline.model.slim_vit import SlimViT


def describe_with_cls(model: VisionTransformer) -> DenseViT:
    """What makes up a plain ViT that reads CLS and has no other prefix token, which is what the rivals are defined for.

    Raises:
        InputError: `model` is another.
    """
    dense = describe_dense(model)
    if dense.rotary is not None:
        raise InputError(f"{dense.name} has rotary positions; the rivals take a ViT with a table of them")
    if dense.gated:
        raise InputError(f"{dense.name} has gated MLPs (SwiGLU); the rivals take a ViT whose MLPs are two layers")
    if dense.num_prefix_tokens != 1:
        raise InputError(
            f"{dense.name} has {dense.num_prefix_tokens} prefix tokens; the rivals take a ViT with CLS alone"
        )
    if dense.global_pool != "token":
        raise InputError(f"{dense.name} reads out by {dense.global_pool!r} pooling; the rivals take one that reads CLS")
    return dense


def vit_macs(dense: DenseViT, tokens: Sequence[int]) -> int:
    """Multiply-accumulates of one image, for a ViT whose token count changes between attention and MLP.

    Args:
        dense: the dense model.
        tokens: [depth + 1], CLS included: what enters the first block, then what each block passes on.
    """
    width = dense.embed_dim
    patch = dense.patch_size[0] * dense.patch_size[1] * dense.in_chans
    total = dense.num_tokens * patch * width + width * dense.num_classes
    for entering, leaving in pairwise(tokens):
        total += entering * width * 4 * width  # query, key, value, projection
        total += entering * entering * 2 * width  # logits and weighted values
        total += leaving * width * 2 * dense.hidden
    return total


def check_channels(model: SlimViT, rival: str) -> None:
    """Refuse a model whose channels a rival's equations do not hold for.

    Raises:
        InputError: something stands between a channel and the layer that reads it.
    """
    dense = model.architecture.dense
    has = {
        "differential attention": dense.differential,
        "rotary positions": dense.rotary is not None,
        "a norm before its second MLP layer": dense.mlp_norm,
        "gated MLPs (SwiGLU)": dense.gated,
    }
    if what := next((what for what, present in has.items() if present), None):
        raise InputError(f"{dense.name} has {what}, which {rival} is not defined for")


def share_text(macs: int, of: int) -> str:
    """A share of the MACs, for people."""
    return f"{macs / of:.3f} of the MACs"


def choice_of(
    block: SlimBlock, hidden: Iterable[int] | None = None, pairs: Sequence[Sequence[int]] | None = None
) -> ChannelChoice:
    """All heads and values of a block, with the hidden channels and the query/key pairs of each head that stay; None:
    all of them."""
    shape = block.shape
    every = tuple(range(shape.qk_dim))
    return ChannelChoice(
        heads=tuple(range(shape.heads)),
        query_key=(every,) * shape.heads if pairs is None else tuple(tuple(sorted(kept)) for kept in pairs),
        value=(tuple(range(shape.v_dim)),) * shape.heads,
        hidden=tuple(range(shape.hidden)) if hidden is None else tuple(sorted(hidden)),
    )
