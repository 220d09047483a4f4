"""Everything an export can be told."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict

from lowpass.export.batch import DEFAULT_PROFILE, BatchProfile
from lowpass.pipeline.base.errors import InputError

Opset = Literal[17, 18, 19, 20, 21, 22, 23]  # of ONNX: from `LayerNormalization` on
OPSETS: tuple[Opset, ...] = get_args(Opset)
OPSET: Opset = 23  # the first with `Attention`, and the newest that every runtime here reads
Selection = Literal["gather", "onehot"]  # how token selection is lowered, see `graph/selection.py`
Input = Literal["float32", "uint8"]  # normalised images, or pixels, see `graph/pixels.py`
# What is written: an ONNX file; that and the folder of `onnx/optimum.py`; or a program of `torch.export`.
Format = Literal["onnx", "optimum", "torch-export"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int8-fp16", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# What the graph computes in, or is quantised from: `int8` for CPUs, `int8-fp16` and `fp8` for TensorRT.
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
    "int8-fp16": torch.float16,
    "fp8": torch.float16,
}
# What is exported when nobody chooses: what a CPU can run. 8 bits for TensorRT are for whoever has a GPU.
USUAL: tuple[Precision, ...] = ("fp32", "fp16", "bf16", "int8")
# Files for TensorRT alone: fewer kernels are worth more arithmetic. BF16 is for CPUs as well.
FOR_TENSORRT: tuple[Precision, ...] = ("fp16", "int8-fp16", "fp8")
QUANTISED: tuple[Precision, ...] = ("int8", "int8-fp16", "fp8")


class ExportOptions(BaseModel):
    """How a model becomes a file. `profile` are the batch sizes that engines will be built for. What is beside `format`
    is of ONNX alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format = "onnx"
    precision: Precision = "fp32"
    profile: BatchProfile = BatchProfile.parse(DEFAULT_PROFILE)
    selection: Selection = "gather"
    input: Input = "float32"
    opset: Opset = OPSET
    keep_fp32: tuple[str, ...] = ()  # layers that stay FP32 in an FP16 file, see `graph/keep_fp32.py`


def export_options(
    precision: Precision,
    batch: str,
    selection: Selection,
    input: Input,
    opset: int,
    keep_fp32: Sequence[str],
    format: Format = "onnx",
) -> ExportOptions:
    """What the command and `Run.export` are asked for.

    Raises:
        InputError: `batch` is not MIN:OPT:MAX, the opset cannot be written, or the format has no such option.
    """
    options = ExportOptions(
        format=format,
        precision=precision,
        profile=BatchProfile.parse(batch),
        selection=selection,
        input=input,
        opset=checked_opset(opset),
        keep_fp32=tuple(keep_fp32),
    )
    changed = [name for name, value in options if name != "format" and value != getattr(ExportOptions(), name)]
    if format == "torch-export" and changed:
        option = "batch" if changed[0] == "profile" else changed[0].replace("_", "-")
        raise InputError(f"--{option} is for ONNX: --format torch-export writes the FP32 model as it is, for any batch")
    if format == "optimum" and input != "float32":
        raise InputError(f"--format optimum takes images that Transformers has normalised, not --input {input}")
    return options


def checked_opset(number: int) -> Opset:
    """An opset that can be written.

    Raises:
        InputError: it is another.
    """
    for opset in OPSETS:
        if opset == number:
            return opset
    older = number < OPSETS[0]
    why = "LayerNormalization came with 17" if older else "23 is the newest that the runtimes read"
    raise InputError(f"--opset takes {OPSETS[0]} to {OPSETS[-1]}, not {number}: {why}")
