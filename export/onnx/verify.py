"""How near an ONNX file comes to PyTorch on the same images, and whether that is near enough to be written."""

import hashlib
import importlib.util
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from lowpass.export.graph.pixels import to_images, to_pixels
from lowpass.export.onnx.bounds import BOUNDS, allowed_wrong, usual
from lowpass.export.onnx.compared import compared
from lowpass.export.onnx.half import rounded
from lowpass.export.options import ExportOptions, Precision
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime, widened
from lowpass.export.runtimes.openvino import OpenVino
from lowpass.export.runtimes.session import Images, Session
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.files import write_json
from lowpass.pipeline.base.progress import logger, track
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
    usual_difference: float  # the same without the images that `Bound.quantile` leaves out
    largest_logit: float  # what those are to be seen against
    same_top1: float  # percent
    ties: int  # images with another top-1 where PyTorch's first two logits, or at FP32 two token scores, are equal
    outliers: int  # images with a logit further off than `Bound.difference`
    largest_magnitude: float | None = None  # of any FP16 tensor; FP16 ends at 65,504
    largest_magnitude_at: str | None = None  # the node
    kept_fp32: tuple[str, ...] = ()  # layers of an FP16 file that are FP32


def judge(verification: Verification, precision: Precision, directory: Path) -> None:
    """Let a file pass that is as near to PyTorch as its precision can be.

    Raises:
        RunError: it is not; or its logits are not finite.
    """
    file, bound, images = verification.file, BOUNDS[precision], verification.images
    if not math.isfinite(verification.largest_difference):
        raise RunError(f"{file}: its logits are not finite; it was not written")
    hint = f"before fine-tuning margins are narrow: run `lowpass finetune {directory}` first, or export fp32"
    if verification.made_images and precision != "fp32":
        return
    most = bound.difference * verification.largest_logit
    if verification.usual_difference > most:
        raise RunError(
            f"{file}: a logit differs by {verification.usual_difference:.2e} from PyTorch on more than "
            f"{100 * (1 - bound.quantile):.0f}% of {images} images, where {most:.2e} is allowed "
            f"({bound.difference:.2g} of the largest logit); it was not written"
        )
    wrong = round((100 - verification.same_top1) / 100 * images) - verification.ties
    if not verification.made_images and wrong > allowed_wrong(images, bound):
        raise RunError(
            f"{file}: top-1 agrees with PyTorch on {verification.same_top1:.2f}% of {images} images "
            f"({verification.ties} more are ties), less than {bound.top1}%; it was not written ({hint})"
        )
    if verification.outliers and precision == "fp32":
        logger.info(
            f"{file}: {verification.outliers} of {images} images differ from PyTorch by more than {most:.2e}, at most "
            f"by {verification.largest_difference:.2e}"
        )


def verifier(content: bytes, precision: Precision) -> tuple[str, Session]:
    """What a file is verified in: ONNX Runtime, but OpenVINO for BF16, which ONNX Runtime lacks on CPUs. Without
    OpenVINO the BF16 file runs in ONNX Runtime with its tensors widened, and the verification says so.

    FP16 is loaded as it is, and then rounded tensor by tensor, which ONNX Runtime does not do by itself on CPUs.
    """
    if precision == "fp16":
        OnnxRuntime(content)
        return "onnxruntime", OnnxRuntime(rounded(content))
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
    seen = (as_seen(images, model, options) for images, _ in track(batches, f"verifying {file}"))
    bound = BOUNDS[options.precision]
    every = compared(session, model, seen, bound, in_doubt=options.precision == "fp32")
    return Verification(
        file=file,
        sha256=hashlib.sha256(content).hexdigest(),
        runtime=runtime,
        images=len(every.differences),
        made_images=made_images,
        largest_difference=float(every.differences.max()),
        usual_difference=usual(every.differences, bound),
        largest_logit=every.largest_logit,
        same_top1=100 * float(every.same.mean()),
        ties=int((every.tied & ~every.same).sum()),
        outliers=int((every.differences > bound.difference * every.largest_logit).sum()),
        kept_fp32=options.keep_fp32,
    )


def as_seen(images: Tensor, model: SlimViT, options: ExportOptions) -> Images:
    """Images [B, C, H, W] as both see them: PyTorch must see what the file sees, which may be whole pixel values."""
    seen: Images = np.ascontiguousarray(images.numpy())
    preprocessing = model.architecture.preprocessing
    return to_images(to_pixels(seen, preprocessing), preprocessing) if options.input == "uint8" else seen


def note(directory: Path, verification: Verification) -> None:
    """Put a verification into the run's `verification.json`, one entry a file."""
    path = directory / VERIFICATION_FILE
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    known[verification.file] = verification.model_dump(mode="json", exclude={"file"})
    write_json(path, dict(sorted(known.items())))
