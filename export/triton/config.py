"""`config.pbtxt`, made through tritonclient's own protobuf."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from lowpass.pipeline.base.errors import InputError

Backend = Literal["python", "onnxruntime", "tensorrt"]
MODEL_FILES: dict[Backend, str] = {"python": "model.onnx", "onnxruntime": "model.onnx", "tensorrt": "model.plan"}
LABELS_FILE = "labels.txt"


@dataclass(frozen=True)
class ModelSettings:
    """What a served model's configuration says. `shape` is one image's; `delay_us` is how long a request may wait for
    company, in microseconds; `threads` are ONNX Runtime's, of each of the `instances`."""

    name: str
    backend: Backend
    uint8: bool
    shape: tuple[int, ...]
    classes: int
    max_batch: int
    preferred: tuple[int, ...]
    delay_us: int
    instances: int
    threads: int
    parameters: dict[str, str]


def config_of(settings: ModelSettings, version: int) -> Any:
    """The configuration that serves `version` alone, as a `ModelConfig`."""
    config = model_config_pb2.ModelConfig(name=settings.name, max_batch_size=settings.max_batch)
    if settings.backend == "tensorrt":
        config.platform = "tensorrt_plan"
    config.backend = settings.backend
    config.default_model_filename = "model.py" if settings.backend == "python" else MODEL_FILES[settings.backend]
    kind = model_config_pb2.TYPE_UINT8 if settings.uint8 else model_config_pb2.TYPE_FP32
    config.input.add(name="images", data_type=kind, dims=settings.shape)
    config.output.add(
        name="logits", data_type=model_config_pb2.TYPE_FP32, dims=[settings.classes], label_filename=LABELS_FILE
    )
    config.dynamic_batching.preferred_batch_size.extend(settings.preferred)
    config.dynamic_batching.max_queue_delay_microseconds = settings.delay_us
    group = model_config_pb2.ModelInstanceGroup
    place = group.KIND_CPU if settings.backend == "python" else group.KIND_AUTO
    config.instance_group.add(count=settings.instances, kind=place)
    config.version_policy.specific.versions.append(version)
    for batch in dict.fromkeys((1, *settings.preferred)):
        warmup = config.model_warmup.add(name=f"batch {batch}", batch_size=batch, count=1)
        warmup.inputs["images"].data_type = kind
        warmup.inputs["images"].dims.extend(settings.shape)
        warmup.inputs["images"].random_data = True
    parameters = dict(settings.parameters)
    if settings.backend == "python":
        parameters["threads"] = str(settings.threads)
    elif settings.backend == "onnxruntime":
        parameters["intra_op_thread_count"] = str(settings.threads)
        config.optimization.graph.level = 1  # all optimisations of ONNX Runtime
    else:
        config.optimization.cuda.graphs = True
        config.optimization.input_pinned_memory.enable = True
        config.optimization.output_pinned_memory.enable = True
    for key, value in parameters.items():
        config.parameters[key].string_value = value
    return config


def as_text(config: Any) -> str:
    """As Triton reads it."""
    return str(text_format.MessageToString(config))


def parse_config(text: str, where: str) -> Any:
    """The other way round.

    Raises:
        InputError: the text is no such configuration.
    """
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise InputError(f"{where} is not a Triton configuration: {error}; deploy under another --name") from None


def served_versions(config: Any) -> Sequence[int]:
    """The versions that its policy names."""
    versions: Sequence[int] = list(config.version_policy.specific.versions)
    return versions
