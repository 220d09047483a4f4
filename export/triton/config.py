"""`config.pbtxt`, made through tritonclient's own protobuf."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from lowpass.export.batch import BatchProfile
from lowpass.export.options import Precision
from lowpass.pipeline.base.errors import InputError

Backend = Literal["python", "onnxruntime", "tensorrt"]
Accelerator = Literal["cuda", "tensorrt"]
CONFIG_REMEDY = (
    "`lowpass deploy --repository REPO --name NAME --rollback --version N` writes that of a version that is there, or "
    "deploy under another --name"
)
MODEL_FILES: dict[Backend, str] = {"python": "model.onnx", "onnxruntime": "model.onnx", "tensorrt": "model.plan"}
LABELS_FILE = "labels.txt"
# Sizes at which a launch costs more than the arithmetic of a few images too many: a batch between two of them is filled
# up to the next, for it is then one CUDA graph. Larger batches are run as they are.
GRAPH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
# The precisions that ONNX Runtime's TensorRT provider is told of in Triton (README of triton-inference-server's
# onnxruntime_backend).
ACCELERATED: dict[Precision, str] = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8", "int8-fp16": "INT8"}
ENGINE_CACHE = "/tmp/lowpass-engines"  # noqa: S108 - inside the container, where the repository is read-only


@dataclass(frozen=True)
class ModelSettings:
    """What a served model's configuration says.

    Attributes:
        shape: one image's.
        profile: batch sizes that the file takes.
        preferred: batch sizes that requests are gathered to.
        delay_us: how long a request may wait for company, in microseconds.
        queue_limit: requests that may wait; what comes on top is refused at once (HTTP 503).
        queue_timeout_ms: how long one may wait before it is refused; 0: for ever.
        threads: ONNX Runtime's, of each of the `instances`.
        accelerator: of ONNX Runtime on a GPU.
        parameters: what a client must know to prepare an image, and what a person may want to know.
    """

    name: str
    backend: Backend
    precision: Precision
    uint8: bool
    shape: tuple[int, ...]
    classes: int
    profile: BatchProfile
    preferred: tuple[int, ...]
    delay_us: int
    queue_limit: int
    queue_timeout_ms: int
    instances: int
    threads: int
    accelerator: Accelerator
    parameters: dict[str, str]


def config_of(settings: ModelSettings, version: int) -> Any:
    """The configuration that serves `version` alone, as a `ModelConfig`; its labels are the version's own."""
    config = model_config_pb2.ModelConfig(name=settings.name, max_batch_size=settings.profile.most)
    if settings.backend == "tensorrt":
        config.platform = "tensorrt_plan"
    config.backend = settings.backend
    config.default_model_filename = "model.py" if settings.backend == "python" else MODEL_FILES[settings.backend]
    kind = model_config_pb2.TYPE_UINT8 if settings.uint8 else model_config_pb2.TYPE_FP32
    config.input.add(name="images", data_type=kind, dims=settings.shape)
    labels = f"{version}/{LABELS_FILE}"
    config.output.add(
        name="logits", data_type=model_config_pb2.TYPE_FP32, dims=[settings.classes], label_filename=labels
    )
    config.dynamic_batching.preferred_batch_size.extend(settings.preferred)
    config.dynamic_batching.max_queue_delay_microseconds = settings.delay_us
    bound_queue(config, settings)
    group = model_config_pb2.ModelInstanceGroup
    place = group.KIND_CPU if settings.backend == "python" else group.KIND_AUTO
    instances = config.instance_group.add(count=settings.instances, kind=place)
    config.version_policy.specific.versions.append(version)
    for batch in dict.fromkeys((settings.profile.least, *settings.preferred)):
        warmup = config.model_warmup.add(name=f"batch {batch}", batch_size=batch, count=1)
        warmup.inputs["images"].data_type = kind
        warmup.inputs["images"].dims.extend(settings.shape)
        warmup.inputs["images"].random_data = True
    parameters = dict(settings.parameters)
    if settings.backend == "python":
        parameters["threads"] = str(settings.threads)
    elif settings.backend == "onnxruntime":
        parameters["intra_op_thread_count"] = str(settings.threads)
        if settings.accelerator == "tensorrt":
            _accelerate(config, settings, version)
    else:
        # Unless told, Triton takes the first profile alone; the fixed sizes have the fewest kernels.
        instances.profile.extend(str(index) for index in range(len(settings.profile.optimisations())))
        _capture_graphs(config.optimization.cuda, settings)
        config.optimization.input_pinned_memory.enable = True
        config.optimization.output_pinned_memory.enable = True
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def _capture_graphs(cuda: Any, settings: ModelSettings) -> None:
    """One launch a batch. Logits leave on a stream of their own, so that the next batch need not wait for them."""
    cuda.graphs = True
    cuda.output_copy_stream = True
    most = settings.profile.most
    small = [size for size in GRAPH_SIZES if size <= most]
    for before, size in pairwise([0, *small]):
        spec = cuda.graph_spec.add(batch_size=size)
        if before + 1 < size:
            spec.graph_lower_bound.batch_size = before + 1
    for size in sorted({*settings.preferred, most} - set(small)):
        cuda.graph_spec.add(batch_size=size)


def _accelerate(config: Any, settings: ModelSettings, version: int) -> None:
    """TensorRT inside ONNX Runtime: engines for the whole range of batches, kept for the server's next start."""
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    image = "x".join(map(str, settings.shape))
    profile = settings.profile
    for key, value in {
        "precision_mode": ACCELERATED[settings.precision],
        "max_workspace_size_bytes": str(4 * 2**30),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": ENGINE_CACHE,
        "trt_engine_cache_prefix": f"{settings.name}-{version}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": ENGINE_CACHE,
        "trt_profile_min_shapes": f"images:{profile.least}x{image}",
        "trt_profile_opt_shapes": f"images:{profile.best}x{image}",
        "trt_profile_max_shapes": f"images:{profile.most}x{image}",
    }.items():
        accelerator.parameters[key] = value


def as_text(config: Any) -> str:
    """As Triton reads it."""
    return str(text_format.MessageToString(config))


def bound_queue(config: Any, settings: ModelSettings) -> None:
    """Let so many requests wait for so long, and refuse what comes on top."""
    queue = config.dynamic_batching.default_queue_policy
    queue.max_queue_size = settings.queue_limit
    queue.timeout_action = model_config_pb2.ModelQueuePolicy.REJECT
    queue.default_timeout_microseconds = 1000 * settings.queue_timeout_ms
    queue.allow_timeout_override = True  # a client that gives up earlier may say so


def parse_config(text: str, where: str, remedy: str = CONFIG_REMEDY) -> Any:
    """The other way round.

    Args:
        text: of a file.
        where: it is.
        remedy: what the message ends with.

    Raises:
        InputError: the text is no such configuration.
    """
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise InputError(f"{where} is not a Triton configuration: {error}; {remedy}") from None
