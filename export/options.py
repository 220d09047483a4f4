"""Everything an export can be told."""

from typing import Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict

from lowpass.export.batch import DEFAULT_PROFILE, BatchProfile

OPSET = 23  # of ONNX: the first with `Attention`
Selection = Literal["gather", "onehot"]  # how token selection is lowered, see `graph/selection.py`
Input = Literal["float32", "uint8"]  # normalised images, or pixels, see `graph/pixels.py`
Precision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# What the graph computes in; INT8 is quantised from FP32.
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
}


class ExportOptions(BaseModel):
    """How a model becomes an ONNX file. `profile` are the batch sizes that engines will be built for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    precision: Precision = "fp32"
    profile: BatchProfile = BatchProfile.parse(DEFAULT_PROFILE)
    selection: Selection = "gather"
    input: Input = "float32"
    keep_fp32: tuple[str, ...] = ()  # layers that stay FP32 in an FP16 file, see `graph/keep_fp32.py`
