"""An exported file is written only when it agrees with PyTorch, and the run directory says how well it does."""

import copy
import hashlib
import importlib.util
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lowpass.export.graph.pixels import to_images, to_pixels
from lowpass.export.onnx.file import onnx_path, serialise, weights_path
from lowpass.export.onnx.quantize import Quantization
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime, widened
from lowpass.export.runtimes.openvino import OpenVino
from lowpass.export.runtimes.session import Images, Session, logits_of
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.files import write_bytes, write_json
from lowpass.pipeline.base.progress import track
from lowpass.pipeline.model.slim_vit import SlimViT

VERIFICATION_FILE = "verification.json"


class Verification(BaseModel):
    """How an ONNX file compares with the FP32 model in PyTorch on the same images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    sha256: str
    runtime: str
    images: int
    made_images: bool  # noise instead of real images: its top-1 says nothing
    largest_difference: float  # of any logit; at FP32 from PyTorch in FP64 where FP32 is in doubt
    largest_logit: float  # what that is to be seen against
    same_top1: float  # percent


# Largest logit difference (None: not bounded) and least share of equal top-1 (percent, rounded up to whole images).
LIMITS: dict[Precision, tuple[float | None, float]] = {
    "fp32": (1e-4, 100.0),
    "fp16": (None, 99.5),
    "bf16": (None, 99.5),
    "int8": (None, 99.0),
    "int8-fp16": (None, 99.0),
    "fp8": (None, 99.0),
}


def export(
    directory: Path,
    options: ExportOptions,
    batches: Iterable[tuple[Tensor, Tensor]],
    made_images: bool = False,
    dense: bool = False,
    calibration: Quantization | None = None,
) -> Verification:
    """Export a run's slim (or dense) model, compare it with PyTorch, and only then write it.

    Args:
        directory: the run.
        options: of the file.
        batches: (images [B, C, H, W], labels); labels are not looked at.
        made_images: the images are noise: what differs is written down but not judged by top-1.
        dense: export `dense.<precision>.onnx` instead of `model.<precision>.onnx`.
        calibration: needed for INT8.

    Raises:
        InputError: the run holds no such model.
        RunError: the file disagrees with PyTorch beyond `LIMITS`; it is not written.
    """
    precision = options.precision
    content = serialise(directory, options, dense, calibration)
    path = onnx_path(directory, precision, dense)
    model = SlimViT.load(directory, weights_path(directory, dense).name)
    verification = compare(path.name, content, model, batches, made_images, options)
    if not math.isfinite(verification.largest_difference):
        raise RunError(f"{path.name}: its logits are not finite; it was not written")
    limit, least = LIMITS[precision]
    if made_images:
        least = 0.0
    if limit is not None and verification.largest_difference > limit:
        raise RunError(
            f"{path.name}: a logit differs by {verification.largest_difference:.2e} from PyTorch, "
            f"more than {limit:.0e}; it was not written"
        )
    # A share of few images is a whole image: one of 20 is 5%.
    wrong = round((100 - verification.same_top1) / 100 * verification.images)
    if wrong > math.ceil((100 - least) / 100 * verification.images - 1e-9):
        raise RunError(
            f"{path.name}: top-1 agrees with PyTorch on {verification.same_top1:.2f}% of "
            f"{verification.images} images, less than {least}%; it was not written (before fine-tuning margins are "
            f"narrow: run `lowpass finetune {directory}` first, or export fp32)"
        )
    write_bytes(path, content)
    _note(directory, verification)
    return verification


def verifier(content: bytes, precision: Precision) -> tuple[str, Session]:
    """What a file is verified in: ONNX Runtime, but OpenVINO for BF16, which ONNX Runtime lacks on CPUs. Without
    OpenVINO the BF16 file runs in ONNX Runtime with its tensors widened, and the verification says so."""
    if precision != "bf16":
        return "onnxruntime", OnnxRuntime(content)
    if importlib.util.find_spec("openvino"):
        return "openvino", OpenVino(content, precision)
    return "onnxruntime, widened to fp32", OnnxRuntime(widened(content))


def compare(
    file: str,
    content: bytes,
    model: SlimViT,
    batches: Iterable[tuple[Tensor, Tensor]],
    made_images: bool,
    options: ExportOptions,
) -> Verification:
    """Run both on every image.

    Raises:
        ValueError: there are no images.
    """
    runtime, session = verifier(content, options.precision)
    preprocessing = model.architecture.preprocessing
    limit, _ = LIMITS[options.precision]
    images = same = 0
    difference = largest = 0.0
    for batch, _ in track(batches, f"verifying {file}"):
        seen: Images = np.ascontiguousarray(batch.numpy())
        if options.input == "uint8":  # PyTorch must see what the file sees: whole pixel values
            seen = to_images(to_pixels(seen, preprocessing), preprocessing)
        with torch.inference_mode():
            expected = model(torch.from_numpy(seen)).numpy()
        got = logits_of(session, seen)
        images += len(batch)
        same += int((got.argmax(-1) == expected.argmax(-1)).sum())
        off = _apart(got, expected)
        if limit is not None and (doubtful := off > limit).any():
            # Two tokens may score alike to the last bit of FP32, and PyTorch itself may keep the wrong one: FP64 tells.
            with torch.inference_mode():
                exact = copy.deepcopy(model).double()(torch.from_numpy(seen[doubtful]).double()).numpy()
            off[doubtful] = np.minimum(off[doubtful], _apart(got[doubtful], exact))
        difference = max(difference, float(off.max()))
        largest = max(largest, float(np.abs(expected).max()))
    if not images:
        raise ValueError("verification needs at least one image")
    return Verification(
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        runtime=runtime,
        images=images,
        made_images=made_images,
        largest_difference=difference,
        largest_logit=largest,
        same_top1=100 * same / images,
    )


def _apart(got: Images, expected: NDArray[Any]) -> NDArray[np.float64]:
    """The largest difference of any logit [B]; NaN is the largest there is."""
    return np.nan_to_num(np.abs(got - expected.astype(np.float64)), nan=np.inf).max(1)


def _note(directory: Path, verification: Verification) -> None:
    """Put it into `verification.json`, one entry a file."""
    path = directory / VERIFICATION_FILE
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    known[verification.file] = verification.model_dump(mode="json", exclude={"file"})
    write_json(path, dict(sorted(known.items())))
