"""What the rivals share: which models they take, and MACs counted as the slim model's are."""

from collections.abc import Sequence
from itertools import pairwise

from timm.models import VisionTransformer

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.model.architecture import DenseViT
from lowpass.pipeline.model.from_timm import describe_dense


def describe_with_cls(model: VisionTransformer) -> DenseViT:
    """What makes up a plain ViT whose only prefix token is CLS, which is what the rivals are defined for.

    Raises:
        InputError: `model` is another.
    """
    dense = describe_dense(model)
    if dense.num_prefix_tokens != 1:
        raise InputError(
            f"{dense.name} has {dense.num_prefix_tokens} prefix tokens; the rivals take a ViT with CLS alone"
        )
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
