"""ONNX files: opset 17 to 23, dynamic batch, `images` -> `logits`, and what the model is in the metadata."""

import importlib.metadata
import json
import platform
from pathlib import Path

import onnx

from lowpass.export.onnx.opset import at_opset
from lowpass.export.onnx.quantize import Quantization, quantize
from lowpass.export.onnx.quantize_half import quantize_half
from lowpass.export.onnx.trace import PRODUCER, to_onnx
from lowpass.export.options import QUANTISED, ExportOptions, Precision
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import sha256
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, WEIGHTS_FILE, SlimViT

PACKAGES = ("lowpass-vit", "torch", "timm", "onnx", "onnxscript")


def onnx_path(directory: Path, precision: Precision, dense: bool = False) -> Path:
    """`model.<precision>.onnx`, or `dense.<precision>.onnx` for the model it came from."""
    return directory / f"{'dense' if dense else 'model'}.{precision}.onnx"


def weights_path(directory: Path, dense: bool = False) -> Path:
    """The weights an ONNX file is made from."""
    return directory / (DENSE_WEIGHTS_FILE if dense else WEIGHTS_FILE)


def serialise(
    directory: Path, options: ExportOptions, dense: bool = False, calibration: Quantization | None = None
) -> bytes:
    """A run's slim (or dense) model as an ONNX file with metadata; the same weights give the same bytes.

    Args:
        directory: the run.
        options: of the file.
        dense: the dense model instead.
        calibration: what 8 bits are calibrated and judged on; the other precisions need none.

    Raises:
        InputError: the run directory holds no such model, or the opset has no words for it.
        RunError: the graph holds an operator that must not be there.
        ValueError: 8 bits without `calibration`.
    """
    slim = SlimViT.load(directory, weights_path(directory, dense).name)
    model = to_onnx(slim, options)
    for key, value in _metadata(slim, options, sha256(weights_path(directory, dense))).items():
        model.metadata_props.add(key=key, value=value)
    if options.precision in QUANTISED:
        if calibration is None:
            raise ValueError(f"{options.precision} needs images to calibrate on")
        if options.precision == "int8":
            model, left_out = quantize(model, calibration)
        else:
            model, left_out = quantize_half(model, calibration, options.precision)
        model.metadata_props.add(key="left_out", value=json.dumps(left_out))
    model = at_opset(model, options.opset)
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def _metadata(slim: SlimViT, options: ExportOptions, weights: str) -> dict[str, str]:
    """What a client or a later step must know, as strings."""
    architecture = slim.architecture
    return {
        "model": architecture.dense.name,
        "num_classes": str(architecture.dense.num_classes),
        "precision": options.precision,
        "batch": str(options.profile),  # any batch size runs; engines are built for these
        "selection": options.selection,
        "input": options.input,
        "kept_fp32": json.dumps(options.keep_fp32),  # layers of an FP16 file
        "architecture": architecture.model_dump_json(),
        "preprocessing": architecture.preprocessing.model_dump_json(),
        "input_size": json.dumps([architecture.dense.in_chans, *architecture.dense.img_size]),
        "weights_sha256": weights,
        "versions": json.dumps(
            {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
        ),
    }


def command_of(path: Path) -> str:
    """What writes a file of `onnx_path`."""
    kind, precision, *_ = path.name.split(".")
    return f"lowpass export {path.parent} --precision {precision}{' --dense' * (kind == 'dense')}"


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an ONNX file written by `serialise`.

    Raises:
        InputError: missing, damaged or not ours.
    """
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; run `{command_of(path)}` first") from None
    except Exception as error:  # protobuf's decoding errors share no base that is public
        raise InputError(f"{path} is not an ONNX file: {error}") from None
    if model.producer_name != PRODUCER:
        raise InputError(f"{path} was not exported by lowpass; run `{command_of(path)}`")
    return {entry.key: entry.value for entry in model.metadata_props}


def kept_fp32(directory: Path, precision: Precision, dense: bool = False) -> tuple[str, ...]:
    """The layers that are FP32 in an FP16 file; none where there is no file of the weights that are there now."""
    try:
        return tuple(json.loads(read_metadata(current_onnx(directory, precision, dense)).get("kept_fp32", "[]")))
    except InputError:
        return ()


def current_onnx(directory: Path, precision: Precision, dense: bool = False) -> Path:
    """The exported file, which must have been made from the weights that are there now.

    Raises:
        InputError: it is missing or older than the weights; the message says the command.
    """
    path, weights = onnx_path(directory, precision, dense), weights_path(directory, dense)
    made_from = read_metadata(path).get("weights_sha256")
    if made_from != sha256(weights):
        raise InputError(
            f"{path} was exported from other weights than {weights.name} holds now; run `{command_of(path)}`"
        )
    return path
