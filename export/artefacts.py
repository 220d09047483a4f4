"""A run's files for deployment, made with the run's own images."""

from pathlib import Path

from lowpass.export.onnx.quantize import Quantization
from lowpass.export.onnx.verify import Verification, export
from lowpass.export.options import PRECISIONS, ExportOptions, Precision
from lowpass.export.tensorrt.build import build, installed_flavours
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.run.images import DataSource, quantization_batches, verification_batches


def export_run(directory: Path, options: ExportOptions, data: DataSource = None, dense: bool = False) -> Verification:
    """Write a run's slim (or dense) model as ONNX, verified, and INT8 calibrated, on the run's images or on `data`.

    Raises:
        InputError: the run holds no such model.
        RunError: the file disagrees with PyTorch; it is not written.
    """
    batches, made = verification_batches(directory, data)
    return export(directory, options, batches, made, dense, _quantization(directory, options.precision, data))


def export_all(directory: Path, data: DataSource = None) -> None:
    """Both models in every precision, verified, and the slim model's engine where TensorRT is installed.

    Raises:
        RunError: a file disagrees with PyTorch, or an engine does not build.
    """
    batches, made = verification_batches(directory, data)
    for precision in PRECISIONS:
        quantization = _quantization(directory, precision, data)
        for dense in (True, False):
            done = export(directory, ExportOptions(precision=precision), batches, made, dense, quantization)
            logger.info(
                "exported %s: top-1 agrees with PyTorch on %.2f %% of %d images, largest logit difference %.1e",
                *(done.file, done.same_top1, done.images, done.largest_difference),
            )
    if installed_flavours():
        logger.info("built %s", build(directory))
    else:
        logger.info("no engine: no TensorRT is installed (pip install 'lowpass-vit[tensorrt-rtx]')")


def _quantization(directory: Path, precision: Precision, data: DataSource) -> Quantization | None:
    """A run's training images for INT8; the other precisions need none."""
    return Quantization(*quantization_batches(directory, data)) if precision == "int8" else None
