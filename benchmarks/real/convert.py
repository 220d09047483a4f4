"""DINOv2's weights as a timm checkpoint, once they give the features that the package's own file gives."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_sample_images
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from lowpass.benchmarks.real.dinov2 import OWN_GRID, dinov2_small, package_file
from lowpass.benchmarks.real.steps import begin, finish
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.files import sha256, write_bytes
from lowpass.pipeline.base.progress import logger

FILE_SIZE = 224  # pixels that the package's file takes
PATCH = 14
LAST_NORM = "/backbone/layernorm/Add_1"
TOLERANCE = 1e-4  # of a feature; they are about 1
CHECKPOINT = "backbone.safetensors"


def convert(cache: Path) -> Path:
    """Write `cache`/dinov2/backbone.safetensors, positions of 518 pixels, without a classifier.

    Raises:
        InputError: the package is not installed.
        RunError: the features differ; nothing is written.
    """
    folder = cache / "dinov2"
    file = folder / CHECKPOINT
    if begin(folder, {"onnx": sha256(package_file())}) is None:
        model = dinov2_small(OWN_GRID[0] * PATCH)
        difference = largest_difference(model.state_dict(), photographs())
        if not difference <= TOLERANCE:
            raise RunError(f"DINOv2's features differ by {difference:.1e} from those of {package_file()}")
        write_bytes(file, save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
        logger.info("DINOv2: features within %.1e of the package's own file", difference)
        finish(folder, {"largest_difference": difference, "sha256": sha256(file)})
    return file


def largest_difference(weights: dict[str, Tensor], images: Tensor) -> float:
    """Between features of timm's model with these weights and the package's, on images [B, 3, 224, 224]."""
    with torch.inference_mode():
        ours = dinov2_small(FILE_SIZE, weights=weights).forward_features(images).numpy()
    return float(np.abs(ours - file_features(images)).max())


def file_features(images: Tensor) -> NDArray[np.float32]:
    """What the package's file computes behind its last norm: [B, 3, 224, 224] -> [B, 257, 384]."""
    model = onnx.load(package_file())
    (last,) = [node.output[0] for node in model.graph.node if node.name == LAST_NORM]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (features,) = session.run([last], {"input_image": images.numpy()})
    return np.asarray(features, np.float32)


def photographs() -> Tensor:
    """scikit-learn's two photographs, whole and mirrored, normalised: [4, 3, 224, 224]."""
    pictures = [Image.fromarray(photo).resize((FILE_SIZE, FILE_SIZE)) for photo in load_sample_images().images]
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255 for picture in pictures])
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    normalised = (pixels - mean) / std
    return torch.cat([normalised, normalised.flip(-1)])
