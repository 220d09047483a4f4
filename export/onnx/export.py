"""The export of a run: traced (`trace.py`), made a file (`file.py`), compared with PyTorch (`verify.py`), then written.

A file that disagrees is not written. How well it agrees stands beside it in `verification.json`.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lowpass.export.graph.keep_fp32 import gone_layers, kept_layers
from lowpass.export.onnx.file import onnx_path, serialise, weights_path
from lowpass.export.onnx.overflow import NameImage, Overflow, find_overflow, further_layers
from lowpass.export.onnx.quantize import Quantization
from lowpass.export.onnx.verify import Verification, as_seen, compare, judge, note
from lowpass.export.options import ExportOptions
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_bytes
from lowpass.pipeline.model.slim_vit import SlimViT


def export(
    directory: Path,
    options: ExportOptions,
    batches: Sequence[tuple[Tensor, Tensor]],
    made_images: bool = False,
    dense: bool = False,
    calibration: Quantization | None = None,
    name_image: NameImage = "image {}".format,
) -> Verification:
    """Export a run's slim (or dense) model, compare it with PyTorch, and only then write it. Where FP16 overflows in a
    few layers, these are kept in FP32.

    Args:
        directory: the run.
        options: of the file.
        batches: (images [B, C, H, W], labels); labels are not looked at.
        made_images: the images are noise: what differs is written down, and only FP32 is judged by it.
        dense: export `dense.<precision>.onnx` instead of `model.<precision>.onnx`.
        calibration: needed for INT8 and FP8.
        name_image: what to call an image by its index in `batches`.

    Raises:
        InputError: the run holds no such model, it has no layer that `options.keep_fp32` names, or that is for another
            precision than FP16.
        RunError: the file disagrees with PyTorch beyond `BOUNDS` (`bounds.py`), or would overflow in FP16; it is not
            written.
    """
    precision = options.precision
    if options.keep_fp32 and precision != "fp16":
        raise InputError(f"--keep-fp32 is for FP16, which overflows past 65,504; {precision} does not")
    path = onnx_path(directory, precision, dense)
    model = SlimViT.load(directory, weights_path(directory, dense).name)
    seen = [as_seen(images, model, options) for images, _ in batches]
    gone = gone_layers(model.architecture.blocks)
    while True:  # until no FP16 tensor overflows; `further_layers` keeps some more in FP32 each time, or gives up
        options = options.model_copy(update={"keep_fp32": kept_layers(options.keep_fp32, len(model.blocks), gone)})
        content = serialise(directory, options, dense, calibration)
        overflow = find_overflow(path.name, content, seen, name_image)
        if overflow is None or overflow.wrong is None:
            break
        kept = further_layers(path.name, overflow, options.keep_fp32, mendable=precision == "fp16")
        options = options.model_copy(update={"keep_fp32": kept})
    verification = _with_overflow(compare(path.name, content, model, batches, made_images, options), overflow)
    judge(verification, precision, directory)
    write_bytes(path, content)
    note(directory, verification)
    return verification


def _with_overflow(verification: Verification, overflow: Overflow | None) -> Verification:
    if overflow is None:
        return verification
    largest = overflow.largest
    return verification.model_copy(update={"largest_magnitude": largest.value, "largest_magnitude_at": largest.node})
