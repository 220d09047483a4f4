"""TensorRT engines: `model.<precision>.plan` from the ONNX file, and a manifest that says what it is good for.

`tensorrt` and `tensorrt-rtx` share one API. TensorRT-RTX compiles without a GPU; running needs one in either.
"""

import shlex
from pathlib import Path

import onnx
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lowpass.export.batch import BatchProfile
from lowpass.export.onnx.file import current_onnx, onnx_path, read_metadata
from lowpass.export.options import Precision
from lowpass.export.runtimes.engine import (
    Capability,
    Flavour,
    compile_engine,
    current_gpu,
    preferred_flavour,
    tensorrt_module,
)
from lowpass.export.tensorrt.layers import Layers, read_layers
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import sha256, write_bytes, write_json
from lowpass.pipeline.base.progress import logger

NO_GPU = "built without a GPU"


class Manifest(BaseModel):
    """What determines an engine, written beside it as `<engine>.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: Flavour
    version: str
    gpu: str
    capability: Capability | None = None  # it runs on GPUs of this compute capability alone
    precision: Precision
    profile: BatchProfile
    onnx: str
    onnx_sha256: str
    plan_sha256: str
    messages: tuple[str, ...] = ()  # what the builder warned of


def plan_path(directory: Path, precision: Precision, dense: bool = False) -> Path:
    """`model.<precision>.plan`, or `dense.<precision>.plan`."""
    return onnx_path(directory, precision, dense).with_suffix(".plan")


def manifest_path(plan: Path) -> Path:
    """The manifest of an engine."""
    return plan.with_name(plan.name + ".json")


def layers_path(plan: Path) -> Path:
    """`model.<precision>.layers.json`: every kernel of an engine that TensorRT-RTX built."""
    return plan.with_suffix(".layers.json")


def load_layers(plan: Path) -> list[Layers]:
    """What `layers_path` holds; nothing for an engine of TensorRT, which names no kernels as it builds."""
    path = layers_path(plan)
    return TypeAdapter(list[Layers]).validate_json(path.read_bytes()) if path.exists() else []


def build(
    directory: Path,
    precision: Precision = "fp16",
    flavour: Flavour | None = None,
    dense: bool = False,
    capability: Capability | None = None,
) -> Path:
    """Compile a run's exported model.

    Args:
        directory: the run, with `model.<precision>.onnx` exported from its present weights.
        precision: of the ONNX file; TensorRT keeps to it (strong typing). FP32 is refused, see below.
        flavour: None for `tensorrt` where it is installed, else `tensorrt-rtx`.
        dense: compile the dense model instead.
        capability: see `compile_engine`.

    Returns:
        The engine; its manifest, the timing cache and, from TensorRT-RTX, what `layers_path` names lie beside it.

    Raises:
        InputError: no TensorRT, nothing exported, or FP32, whose `Attention` nodes TensorRT has no fused kernel for.
        RunError: the parser or the compiler refused the graph.
    """
    if precision == "fp32":
        raise InputError("TensorRT has no fused attention in FP32; export and build fp16")
    flavour = flavour or preferred_flavour()
    trt = tensorrt_module(flavour)
    onnx_file = current_onnx(directory, precision, dense)
    profile = BatchProfile.parse(read_metadata(onnx_file)["batch"])
    content = onnx_file.read_bytes()
    cache_file = directory / f"timing.{flavour}.cache"
    known = cache_file.read_bytes() if cache_file.exists() else b""
    compiled = compile_engine(flavour, content, profile, known, capability)
    target = plan_path(directory, precision, dense)
    if compiled.timing_cache:
        write_bytes(cache_file, compiled.timing_cache)
    # The old manifest goes first: should we die between the two, a plan without a manifest is refused, never mistaken.
    manifest_path(target).unlink(missing_ok=True)
    layers_path(target).unlink(missing_ok=True)
    write_bytes(target, compiled.plan)
    if not compiled.log:
        logger.info("%s named no kernels as it built: there is no %s", flavour, layers_path(target).name)
    else:
        layers = read_layers(compiled.log, onnx.load_model_from_string(content), profile)
        write_json(layers_path(target), [at.model_dump(mode="json") for at in layers])
    manifest = Manifest(
        runtime=flavour,
        version=str(trt.__version__),
        gpu=current_gpu() or NO_GPU,
        capability=capability,
        precision=precision,
        profile=profile,
        onnx=onnx_file.name,
        onnx_sha256=sha256(onnx_file),
        plan_sha256=sha256(target),
        messages=compiled.warnings,
    )
    write_json(manifest_path(target), manifest.model_dump(mode="json"))
    return target


def trtexec(directory: Path, manifest: Manifest) -> str:
    """The command by which TensorRT's own tool, 10.14 or later, builds an engine of the same ONNX file and batches."""
    file = directory / manifest.onnx
    one, *_ = onnx.load(file, load_external_data=False).graph.input
    shape = "x".join(str(size.dim_value) for size in one.type.tensor_type.shape.dim[1:])
    batches = {"min": manifest.profile.least, "opt": manifest.profile.best, "max": manifest.profile.most}
    return shlex.join(
        [
            "trtexec",
            f"--onnx={file}",
            f"--saveEngine={file.with_suffix('.plan')}",
            "--stronglyTyped",
            *(f"--{which}Shapes=images:{batch}x{shape}" for which, batch in batches.items()),
        ]
    )


def current_plan(directory: Path, precision: Precision, flavour: Flavour, dense: bool = False) -> tuple[Path, Manifest]:
    """An engine that fits this ONNX file, this runtime version and this GPU.

    Raises:
        InputError: there is none; the message names what differs and the command that rebuilds it.
    """
    plan = plan_path(directory, precision, dense)
    remedy = f"run `lowpass build {directory} --precision {precision} --runtime {flavour}`"
    try:
        manifest = Manifest.model_validate_json(manifest_path(plan).read_bytes())
        content_hash = sha256(plan)
    except OSError as error:
        raise InputError(f"there is no engine {plan} with its manifest ({error.strerror}); {remedy}") from None
    except ValidationError:
        raise InputError(f"{manifest_path(plan)} is not an engine's manifest; {remedy}") from None
    onnx_file = current_onnx(directory, precision, dense)
    gpu = current_gpu() or NO_GPU
    # An engine of TensorRT-RTX is compiled for all its GPUs, one of TensorRT for the GPU it was built on.
    built_for = gpu if manifest.gpu == NO_GPU and flavour == "tensorrt-rtx" else manifest.gpu
    for what, was, now in (
        ("file", manifest.plan_sha256, content_hash),
        ("ONNX", manifest.onnx_sha256, sha256(onnx_file)),
        ("runtime", manifest.runtime, flavour),
        ("version", manifest.version, str(tensorrt_module(flavour).__version__)),
        ("GPU", built_for, gpu),
    ):
        if was != now:
            raise InputError(f"{plan} does not fit: {what} is {now}, it was built for {was}; {remedy}")
    return plan, manifest
