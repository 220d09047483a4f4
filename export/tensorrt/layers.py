"""`model.<precision>.layers.json`: every kernel of an engine, what it reads and writes, and its ONNX nodes.

At batch 1 a GPU is bound by how many kernels run. TensorRT-RTX names each while it builds, without a GPU: its log with
detailed profiling has a line a kernel, `Name: ..., LayerType: ..., Inputs: [...], Constants: [...], Outputs: [...], ...
Metadata: [ONNX Layer: ...]` (seen in 1.7.1). `signal` and `wait` join its streams and are no kernels; `shape_call`,
`reshape` and `cast` work out shapes from the batch.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import onnx
from pydantic import BaseModel, ConfigDict

from lowpass.export.batch import BatchProfile

NOT_KERNELS = {"signal", "wait", "shape_call", "reshape", "cast"}
BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "FP8": 1, "Int32": 4, "Int64": 8, "Bool": 1, "UInt8": 1}
PRODUCTS = {"Conv", "MatMul", "Gemm", "Attention"}
# Of the kernels that name a product, the one that computes it; others move or pad what it reads.
COMPUTES = re.compile(r"gemm|runtime_fusion|correlation|_gem[mv]_mha|MulSum")
TENSOR = re.compile(r"\{ Name: .*?, Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


class Tensor(BaseModel):
    """A tensor that a kernel reads or writes; -1 stands for what hangs on the batch."""

    model_config = ConfigDict(frozen=True)

    shape: tuple[int, ...]
    type: str

    @property
    def bytes(self) -> int | None:
        """Its size; None: it hangs on the batch."""
        return None if -1 in self.shape else math.prod(self.shape) * BYTES.get(self.type, 1)


class Kernel(BaseModel):
    """One kernel. `macs` and bytes are of the whole batch; None where they hang on it."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: str  # TensorRT's own: gemm, runtime_fusion (a product with what follows), correlation, kgen (all else)
    block: int | None  # None: embedding and head
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]  # of the ONNX file
    macs: int | None
    bytes_read: int | None
    bytes_written: int | None

    @property
    def is_attention(self) -> bool:
        """Whether it is a fused attention of many rows."""
        return self.name.startswith("_gemm_mha")

    @property
    def computes_in(self) -> str:
        """The type of what it reads."""
        return self.inputs[0].type if self.inputs else ""


class Totals(BaseModel):
    """Of the kernels of a block, or of the whole engine."""

    model_config = ConfigDict(frozen=True)

    block: int | None
    kernels: int
    macs: int | None
    bytes_read: int | None
    bytes_written: int | None


class Layers(BaseModel):
    """The kernels for one batch size, or for a range of them, such as `1:8:32`."""

    model_config = ConfigDict(frozen=True)

    batch: str
    kernels: tuple[Kernel, ...]
    whole: Totals
    blocks: tuple[Totals, ...]


def read_layers(lines: Iterable[str], model: onnx.ModelProto, profile: BatchProfile) -> list[Layers]:
    """What the builder said, by its optimisation profiles.

    Args:
        lines: of the builder's log; others than a kernel's are passed over.
        model: what was built.
        profile: the batch sizes it was built for.
    """
    found: dict[int, list[str]] = {}
    for line in lines:
        number = re.search(r"_myl(\d+)_\d+, LayerType: (\w+)", line)
        if number is not None and number[2] not in NOT_KERNELS:
            found.setdefault(int(number[1]), []).append(line.strip())
    result = []
    for index, (least, best, most) in enumerate(profile.optimisations()):
        fixed = least if least == most else None
        parsed = [_kernel(line) for line in found.get(index, ())]
        kernels = _with_macs(parsed, {} if fixed is None else macs_by_node(model, fixed), fixed is not None)
        numbers = sorted({kernel.block for kernel in kernels if kernel.block is not None})
        result.append(
            Layers(
                batch=str(fixed) if fixed is not None else f"{least}:{best}:{most}",
                kernels=tuple(kernels),
                whole=_totals(None, kernels),
                blocks=tuple(_totals(number, [k for k in kernels if k.block == number]) for number in numbers),
            )
        )
    return result


def macs_by_node(model: onnx.ModelProto, batch: int) -> dict[str, int]:
    """Multiply-accumulates of every product of a graph, by the node's name, for a whole batch."""
    inferred = onnx.shape_inference.infer_shapes(model)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(batch if dim.dim_param else dim.dim_value for dim in dims)
    found = {}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or any(name not in shapes for name in (*node.input[:2], node.output[0])):
            continue
        first, second, output = (shapes[name] for name in (*node.input[:2], node.output[0]))
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Attention":
            # Query with keys, and weights with values: over all heads as wide as the tensors' rows.
            (queries, width), keys = (first[-2:], second[-2]) if len(first) == 4 else (first[1:], second[1])
            found[node.name] = 2 * math.prod(first[:-2]) * queries * keys * width
        elif node.op_type == "Conv":
            found[node.name] = math.prod(output) * math.prod(second[1:])
        else:
            transposed = node.op_type == "Gemm" and "transA" in attributes and attributes["transA"].i
            found[node.name] = math.prod(output) * first[-2 if transposed else -1]
    return found


def table(layers: Layers) -> str:
    """For people: a line a kernel, in the order they run."""
    header = ("block", "kind", "in", "out", "MACs (M)", "read (KB)", "written (KB)", "ONNX nodes")
    rows = [
        (
            "-" if kernel.block is None else str(kernel.block),
            "attention" if kernel.is_attention else kernel.kind,
            kernel.computes_in,
            " ".join("x".join(map(str, tensor.shape)) for tensor in kernel.outputs),
            _scaled(kernel.macs, 1e6),
            _scaled(kernel.bytes_read, 1e3),
            _scaled(kernel.bytes_written, 1e3),
            ", ".join(node.removeprefix(f"blocks.{kernel.block}.") for node in kernel.nodes),
        )
        for kernel in layers.kernels
    ]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    whole = layers.whole
    said = f"batch {layers.batch}: {whole.kernels} kernels"
    if whole.macs is not None and whole.bytes_read is not None and whole.bytes_written is not None:
        moved = (whole.bytes_read + whole.bytes_written) / 1e6
        said += f", {whole.macs / 1e9:.2f} G MACs, {moved:.1f} MB read and written"
    return "\n".join([said, *(line.rstrip() for line in lines)])


def _kernel(line: str) -> Kernel:
    name = line.split("Name: ", 1)[1].split(", LayerType: ", 1)[0]
    kind = line.split("LayerType: ", 1)[1].split(",", 1)[0]
    sections = re.split(r", (?:Inputs|Constants|Outputs|TacticName): ", line)
    inputs, constants, outputs = (_tensors(section) for section in sections[1:4])
    nodes = tuple(dict.fromkeys(NODE.findall(line)))
    blocks = [int(match[1]) for node in nodes if (match := re.match(r"blocks\.(\d+)\.", node))]
    return Kernel(
        name=re.sub(r"( \[profile \d+\])?_myl\d+_\d+$", "", name),
        kind=kind,
        # A norm is often fused with the residual sum before it: the kernel is the later block's.
        block=max(blocks, default=None),
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        nodes=nodes,
        macs=None,
        bytes_read=_sum(tensor.bytes for tensor in (*inputs, *constants)),
        bytes_written=_sum(tensor.bytes for tensor in outputs),
    )


def _tensors(section: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(shape=tuple(int(size) for size in shape.split(",") if size.strip()), type=kind)
        for shape, kind in TENSOR.findall(section)
    )


def _with_macs(kernels: Sequence[Kernel], macs: Mapping[str, int], known: bool) -> list[Kernel]:
    """Every product's MACs at the kernel that computes it."""
    where: dict[str, int] = {}
    for index, kernel in enumerate(kernels):
        computes = COMPUTES.search(f"{kernel.kind} {kernel.name}") is not None
        for node in kernel.nodes:
            if node in macs and (computes or node not in where):
                where[node] = index
    sums = [0] * len(kernels)
    for node, index in where.items():
        sums[index] += macs[node]
    return [k.model_copy(update={"macs": total if known else None}) for k, total in zip(kernels, sums, strict=True)]


def _totals(block: int | None, kernels: Sequence[Kernel]) -> Totals:
    return Totals(
        block=block,
        kernels=len(kernels),
        macs=_sum(kernel.macs for kernel in kernels),
        bytes_read=_sum(kernel.bytes_read for kernel in kernels),
        bytes_written=_sum(kernel.bytes_written for kernel in kernels),
    )


def _sum(values: Iterable[int | None]) -> int | None:
    """None if any is."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _scaled(value: int | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.1f}"
