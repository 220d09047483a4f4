"""`Session`: a model ready to run, in PyTorch, ONNX Runtime, OpenVINO or TensorRT."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lowpass.export.graph.pixels import to_pixels
from lowpass.pipeline.model.architecture import Preprocessing

Images = NDArray[np.float32]


class Session(Protocol):
    """A model ready to run."""

    def load(self, images: Images) -> None:
        """Put a batch [B, C, H, W] FP32 (normalised) where the runtime reads it; not part of a latency."""

    def run(self) -> None:
        """Compute the logits of what was loaded, and wait for them."""

    def logits(self) -> Images:
        """[B, classes] FP32 of the last run."""


def logits_of(session: Session, batch: Images) -> Images:
    """Load, run, read."""
    session.load(batch)
    session.run()
    return session.logits()


def as_input(images: Images, metadata: Mapping[str, str]) -> NDArray[Any]:
    """Normalised images as the exported file takes them: as they are, or pixels [B, H, W, C] uint8."""
    if metadata.get("input") == "uint8":
        return to_pixels(images, Preprocessing.model_validate_json(metadata["preprocessing"]))
    return np.ascontiguousarray(images)
