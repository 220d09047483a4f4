"""What several test files share: small models, and how hypothesis draws its examples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from timm.models import VisionTransformer

import pipeline.dense
from pipeline.slim import SlimViT

torch.set_num_threads(1)  # test processes run side by side, and a tiny model gains nothing from a second thread

# The same examples on every run and every machine, however slow.
settings.register_profile("lowpass", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("lowpass")

MakeViT = Callable[..., VisionTransformer]


@pytest.fixture(scope="session")
def make_vit() -> MakeViT:
    """A factory of small dense ViTs: 16 tokens of 24 channels, 2 blocks of 3 heads, 5 classes unless told otherwise."""

    def make(kind: type[VisionTransformer] = VisionTransformer, seed: int = 0, **changes: Any) -> VisionTransformer:
        small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
        torch.manual_seed(seed)
        model = kind(**(small | changes))
        with torch.no_grad():  # timm starts biases at zero and scales at a constant, where a mix-up would not show
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def digits_slim() -> SlimViT:
    """The embedded digits model with nothing removed yet. Shared: copy it before changing it."""
    return SlimViT.from_timm(pipeline.dense.load_dense("digits_deit"))
