"""ONNX files: opset 23, dynamic batch, `images` -> `logits`, and what the model is in the metadata."""

import ast
import importlib.metadata
import json
import platform
import warnings
from pathlib import Path

import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from lowpass.export.graph.deploy import deployable
from lowpass.export.graph.pixels import FromPixels
from lowpass.export.onnx.quantize import Quantization, quantize
from lowpass.export.options import OPSET, ExportOptions, Precision
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.base.files import sha256
from lowpass.pipeline.base.progress import quiet
from lowpass.pipeline.model.slim_vit import DENSE_WEIGHTS_FILE, WEIGHTS_FILE, SlimViT

NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter says which module a node comes from
PRODUCER = "lowpass"
PACKAGES = ("lowpass-vit", "torch", "timm", "onnx", "onnxscript")
# Operators whose output shape hangs on data, and the transform that TensorRT's parser refuses.
FORBIDDEN = {"DFT", "NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit", "Loop", "If", "Scan"}


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
        calibration: what INT8 is calibrated and judged on; the other precisions need none.

    Raises:
        InputError: the run directory holds no such model.
        RunError: the graph holds an operator that must not be there.
        ValueError: INT8 without `calibration`.
    """
    slim = SlimViT.load(directory, weights_path(directory, dense).name)
    model = to_onnx(slim, options)
    for key, value in _metadata(slim, options, sha256(weights_path(directory, dense))).items():
        model.metadata_props.add(key=key, value=value)
    if options.precision == "int8":
        if calibration is None:
            raise ValueError("INT8 needs images to calibrate on")
        model, left_out = quantize(model, calibration)
        model.metadata_props.add(key="left_out", value=json.dumps(left_out))
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def to_onnx(slim: SlimViT, options: ExportOptions) -> onnx.ModelProto:
    """The graph of `slim`, weights inside, without metadata.

    Raises:
        RunError: it holds a `DFT`, complex or data-dependent-shape node.
    """
    dense = slim.architecture.dense
    module = deployable(slim.cpu(), options.precision, options.selection)
    example = torch.zeros(2, dense.in_chans, *dense.img_size)
    if options.input == "uint8":
        module = FromPixels(module, slim.architecture.preprocessing)
        example = torch.zeros(2, *dense.img_size, dense.in_chans, dtype=torch.uint8)
    return trace(module, example)


def trace(module: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    """Any module from `images` to `logits` as an ONNX graph with a dynamic batch; `example` is a batch of 2.

    Raises:
        RunError: it holds a `DFT`, complex or data-dependent-shape node.
    """
    with warnings.catch_warnings(), quiet("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    _name_by_module(program.model)
    # The exporter writes stack traces of this machine into every node.
    ClearMetadataAndDocStringPass()(program.model)
    model: onnx.ModelProto = onnx_ir.to_proto(program.model)
    model.producer_name = PRODUCER
    _refuse_forbidden(model)
    return model


def _name_by_module(model: onnx_ir.Model) -> None:
    """Name each node after the module it comes from, such as `blocks.3.mlp.fc1.MatMul`: profiles are read by people."""
    taken: dict[str, int] = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))
        module = scopes[-2].removeprefix("model.").removeprefix("vit.") if len(scopes) > 1 else ""
        name = ".".join(part for part in (module, node.op_type) if part)
        taken[name] = taken.get(name, -1) + 1
        node.name = f"{name}_{taken[name]}" if taken[name] else name


def _refuse_forbidden(model: onnx.ModelProto) -> None:
    kinds = {onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
    for node in model.graph.node:
        if node.op_type in FORBIDDEN:
            raise RunError(f"the exported graph holds a {node.op_type} node ({node.name})")
    for value in [*model.graph.value_info, *model.graph.output]:
        if value.type.tensor_type.elem_type in kinds:
            raise RunError(f"the exported graph holds a complex tensor ({value.name})")


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
        "architecture": architecture.model_dump_json(),
        "preprocessing": architecture.preprocessing.model_dump_json(),
        "input_size": json.dumps([architecture.dense.in_chans, *architecture.dense.img_size]),
        "weights_sha256": weights,
        "versions": json.dumps(
            {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
        ),
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of an ONNX file written by `serialise`.

    Raises:
        InputError: missing, damaged or not ours.
    """
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; run `lowpass export {path.parent}` first") from None
    except Exception as error:  # protobuf's decoding errors share no base that is public
        raise InputError(f"{path} is not an ONNX file: {error}") from None
    if model.producer_name != PRODUCER:
        raise InputError(f"{path} was not exported by lowpass; run `lowpass export {path.parent}`")
    return {entry.key: entry.value for entry in model.metadata_props}


def current_onnx(directory: Path, precision: Precision, dense: bool = False) -> Path:
    """The exported file, which must have been made from the weights that are there now.

    Raises:
        InputError: it is missing or older than the weights; the message says the command.
    """
    path, weights = onnx_path(directory, precision, dense), weights_path(directory, dense)
    made_from = read_metadata(path).get("weights_sha256")
    if made_from != sha256(weights):
        raise InputError(
            f"{path} was exported from other weights than {weights.name} holds now; "
            f"run `lowpass export {directory} --precision {precision}`"
        )
    return path
