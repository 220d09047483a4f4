"""A run's files for deployment, made with the run's own images."""

from functools import partial
from pathlib import Path

from lowpass.export.graph.deployable import deployable
from lowpass.export.onnx.export import export
from lowpass.export.onnx.file import current_onnx, kept_fp32, onnx_path, read_metadata, weights_path
from lowpass.export.onnx.optimum import optimum_path, processor_of, write_optimum
from lowpass.export.onnx.quantize import Quantization
from lowpass.export.onnx.verify import Verification
from lowpass.export.options import QUANTISED, USUAL, ExportOptions, Precision
from lowpass.export.runtimes.engine import FLAVOURS, installed_flavours
from lowpass.export.runtimes.pytorch import TORCH, torch_session
from lowpass.export.runtimes.registry import RuntimeName, check_precision, missing, onnx_session
from lowpass.export.runtimes.session import Session
from lowpass.export.runtimes.tensorrt import TensorRT
from lowpass.export.tensorrt.plan import build, current_plan
from lowpass.export.torch_program import export_program, program_path
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.run.images import DataSource, image_name, quantization_batches, verification_batches


def export_run(directory: Path, options: ExportOptions, data: DataSource = None, dense: bool = False) -> Verification:
    """Write a run's slim (or dense) model, verified, and INT8 calibrated, on the run's images or on `data`.

    Raises:
        InputError: the run holds no such model, or the format is not for it.
        RunError: the file disagrees with PyTorch; it is not written.
    """
    if options.format == "optimum":
        processor_of(SlimViT.load(directory).architecture)  # refused before there is work
    batches, made = verification_batches(directory, data)
    if options.format == "torch-export":
        return export_program(directory, batches, made, dense)
    quantization = quantization_of(directory, options.precision, data)
    done = export(directory, options, batches, made, dense, quantization, partial(image_name, directory, data))
    if options.format == "optimum":
        write_optimum(directory, options.precision, dense)
    return done


def exported_path(directory: Path, options: ExportOptions, dense: bool = False) -> Path:
    """What `export_run` writes: a file, or the folder for Optimum."""
    if options.format == "torch-export":
        return program_path(directory, dense)
    if options.format == "optimum":
        return optimum_path(directory, options.precision, dense)
    return onnx_path(directory, options.precision, dense)


def export_all(directory: Path, data: DataSource = None) -> None:
    """Both models in every usual precision, verified, and the slim model's engine where TensorRT is installed.

    Raises:
        RunError: a file disagrees with PyTorch, or an engine does not build.
    """
    batches, made = verification_batches(directory, data)
    for precision in USUAL:
        quantization = quantization_of(directory, precision, data)
        for dense in (True, False):
            options = ExportOptions(precision=precision)
            done = export(directory, options, batches, made, dense, quantization, partial(image_name, directory, data))
            logger.info(
                "exported %s: top-1 agrees with PyTorch on %.2f %% of %d images, largest logit difference %.1e",
                *(done.file, done.same_top1, done.images, done.largest_difference),
            )
    if installed_flavours():
        logger.info("built %s", build(directory))
    else:
        logger.info("no engine: no TensorRT is installed (pip install 'lowpass-vit[tensorrt-rtx]')")


def open_session(runtime: RuntimeName, directory: Path, precision: Precision, dense: bool = False) -> Session:
    """A session on a run's slim (or dense) model.

    Raises:
        InputError: the runtime is missing here or lacks the precision, or its file is missing or stale.
        RunError: the runtime cannot load it.
    """
    reason = missing(runtime)
    if reason is not None:
        raise InputError(f"cannot run on {runtime}: {reason}")
    check_precision(runtime, precision)
    if runtime in TORCH:
        model = SlimViT.load(directory, weights_path(directory, dense).name)
        kept = kept_fp32(directory, precision, dense)
        return torch_session(runtime, deployable(model, precision, kept=kept))
    onnx_file = current_onnx(directory, precision, dense)
    if runtime in FLAVOURS:
        plan, _ = current_plan(directory, precision, runtime, dense)
        return TensorRT(plan.read_bytes(), runtime, read_metadata(onnx_file))
    return onnx_session(runtime, onnx_file.read_bytes(), precision, directory)


def quantization_of(directory: Path, precision: Precision, data: DataSource = None) -> Quantization | None:
    """A run's training images for 8 bits; the other precisions need none."""
    return Quantization(*quantization_batches(directory, data)) if precision in QUANTISED else None
