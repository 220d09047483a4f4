"""From a PyTorch module to an ONNX graph: opset 23, dynamic batch, `images` -> `logits`."""

import ast
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn

from lowpass.export.graph.deployable import deployable
from lowpass.export.graph.keep_fp32 import gone_layers, kept_layers
from lowpass.export.graph.pixels import FromPixels
from lowpass.export.options import OPSET, ExportOptions
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.progress import quiet
from lowpass.pipeline.model.slim_vit import SlimViT

NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter says which module a node comes from
PRODUCER = "lowpass"
# Operators whose output shape hangs on data, and the transform that TensorRT's parser refuses.
FORBIDDEN = {"DFT", "NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit", "Loop", "If", "Scan"}


def to_onnx(slim: SlimViT, options: ExportOptions) -> onnx.ModelProto:
    """The graph of `slim`, weights inside, without metadata.

    Raises:
        RunError: it holds a `DFT`, complex or data-dependent-shape node.
    """
    dense = slim.architecture.dense
    kept = kept_layers(options.keep_fp32, dense.depth, gone_layers(slim.architecture.blocks))
    module = deployable(slim.cpu(), options.precision, options.selection, kept)
    example = torch.zeros(2, dense.in_chans, *dense.img_size)
    if options.input == "uint8":
        module = FromPixels(module, slim.architecture.preprocessing)
        example = torch.zeros(2, *dense.img_size, dense.in_chans, dtype=torch.uint8)
    return trace(module, example)


def trace(module: nn.Module, example: torch.Tensor, **more: torch.Tensor) -> onnx.ModelProto:
    """Any module from `images` to `logits` as an ONNX graph with a dynamic batch; `example` is a batch of 2, and so are
    `more` inputs by name.

    Raises:
        RunError: it holds a `DFT`, complex or data-dependent-shape node.
    """
    with warnings.catch_warnings(), quiet("torch.onnx", "onnxscript"), _garbage_left():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (example, *more.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images", *more],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},) * (1 + len(more)),
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


@contextmanager
def _garbage_left() -> Iterator[None]:
    """The exporter makes many small objects that live until it ends: to look among them for garbage, again and again,
    takes a seventh of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
