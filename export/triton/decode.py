"""Pictures in, labels out: what stands around a served model NAME so that clients send files as they are.

`NAME-prepare` decodes and prepares, `NAME-labels` names the best classes, and the ensemble `NAME-pictures` runs the
three in a row inside the server."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritonclient.grpc import model_config_pb2

from lowpass.export.triton.config import LABELS_FILE, ModelSettings, bound_queue
from lowpass.export.triton.version import CONFIG_FILE, ModelVersion, served_config, served_version
from lowpass.pipeline.base.errors import InputError

PREPARED = ("preprocessing", "input_size", "input")  # parameters that say how
AROUND = ("prepare", "labels", "pictures")
AROUND_OF = "lowpass_around"  # a parameter that names the model which another stands around
BACKENDS = Path(__file__).parent / "backend"
TOP = 5


@dataclass(frozen=True)
class DecodeLimits:
    """The most of a picture that is taken: bytes as it was sent, and pixels by its header, before it is decoded."""

    bytes: int = 20 * 2**20
    pixels: int = 50_000_000


def picture_models(
    settings: ModelSettings,
    labels: Sequence[str],
    limits: DecodeLimits = DecodeLimits(),
    top: int = TOP,
    instances: int | None = None,
) -> list[ModelVersion]:
    """`NAME-prepare`, `NAME-labels` and `NAME-pictures` of a model, in this order.

    The ensemble calls whichever version of each is served, so all versions of the model must share preprocessing and
    labels: `check_pictures`.

    Args:
        settings: of the model; its `parameters` say how to prepare a picture.
        labels: of the classes, in the order of the logits.
        limits: of a picture.
        top: classes of an answer; no more than there are.
        instances: of `NAME-prepare`. None: a core each. Decoding is what costs beside the model, an instance decodes
            one request at a time, and one that waits takes nothing.
    """
    top = min(top, settings.classes)
    prepare = _python(settings, "prepare", instances or len(os.sched_getaffinity(0)))
    prepare.input.add(name="picture", data_type=model_config_pb2.TYPE_STRING, dims=[1])
    kind = model_config_pb2.TYPE_UINT8 if settings.uint8 else model_config_pb2.TYPE_FP32
    prepare.output.add(name="images", data_type=kind, dims=settings.shape)
    wanted = {key: settings.parameters[key] for key in PREPARED}
    _set(prepare, wanted | {"decode_bytes": str(limits.bytes), "decode_pixels": str(limits.pixels)})

    name_classes = _python(settings, "labels", 1)
    name_classes.input.add(name="logits", data_type=model_config_pb2.TYPE_FP32, dims=[settings.classes])
    _answers(name_classes, top)
    _set(name_classes, {"top": str(top)})

    ensemble = model_config_pb2.ModelConfig(
        name=f"{settings.name}-pictures", platform="ensemble", max_batch_size=settings.profile.most
    )
    ensemble.input.add(name="picture", data_type=model_config_pb2.TYPE_STRING, dims=[1])
    _answers(ensemble, top)
    for name, takes, gives in (
        (prepare.name, ["picture"], ["images"]),
        (settings.name, ["images"], ["logits"]),
        (name_classes.name, ["logits"], [output.name for output in ensemble.output]),
    ):
        step = ensemble.ensemble_scheduling.step.add(model_name=name, model_version=-1)
        step.input_map.update({each: each for each in takes})
        step.output_map.update({each: each for each in gives})

    for one in (prepare, name_classes, ensemble):
        _set(one, {AROUND_OF: settings.name})
    return [
        ModelVersion(prepare.name, prepare, {"model.py": BACKENDS / "prepare.py"}),
        ModelVersion(
            name_classes.name, name_classes, {"model.py": BACKENDS / "labels.py", LABELS_FILE: label_text(labels)}
        ),
        ModelVersion(ensemble.name, ensemble, {}),
    ]


def label_text(labels: Sequence[str]) -> str:
    """A label a line, as Triton reads them."""
    return "".join(f"{label}\n" for label in labels)


def around(model: Path) -> list[Path]:
    """What stands around a model, in the order in which it can be taken away: what calls the others first. A deploy or
    a removal that was killed may have left some of them."""
    models = [model.with_name(f"{model.name}-{what}") for what in reversed(AROUND)]
    return [one for one in models if (one / CONFIG_FILE).is_file() and _stands_around(served_config(one), model)]


def takes_pictures(model: Path) -> bool:
    """Whether `NAME-pictures` stands around a model; somebody's own model may have that name."""
    pictures = model.with_name(f"{model.name}-pictures")
    return (pictures / CONFIG_FILE).is_file() and _stands_around(served_config(pictures), model)


def check_place(model: Path) -> None:
    """That what is to stand around a model takes nobody's place.

    Raises:
        InputError: there are models of these names that are somebody's own.
    """
    for one in (model.with_name(f"{model.name}-{what}") for what in AROUND):
        if (one / CONFIG_FILE).is_file() and not _stands_around(served_config(one), model):
            raise InputError(f"{one} is in the place of what --decode puts around {model.name}; give another --name")


def stands_around(model: Path) -> str | None:
    """The model that `picture_models` made this one for; None: for none."""
    if not (model / CONFIG_FILE).is_file():
        return None
    return served_config(model).parameters[AROUND_OF].string_value or None


def _stands_around(config: Any, model: Path) -> bool:
    """Whether `picture_models` made it for a model; a deploy that was killed may have left some of them. Before they
    carried a mark they were known by the ensemble, which calls the three in a row."""
    if AROUND_OF in config.parameters:
        return bool(config.parameters[AROUND_OF].string_value == model.name)
    pictures = model.with_name(f"{model.name}-pictures")
    if not (pictures / CONFIG_FILE).is_file():
        return False
    called = [step.model_name for step in served_config(pictures).ensemble_scheduling.step]
    return called == [f"{model.name}-prepare", model.name, f"{model.name}-labels"]


def check_pictures(model: Path, config: Any, labels: str) -> None:
    """That a version may be served where pictures are prepared and classes named around the model, if they are.

    Args:
        model: its folder in the repository.
        config: of the version.
        labels: of the version, a line each.

    Raises:
        InputError: it wants other pictures or names other classes than `NAME-pictures` gives, or takes fewer at once.
    """
    if not takes_pictures(model):
        return
    three = [model.with_name(f"{model.name}-{what}") for what in AROUND]
    remove = f"`lowpass deploy --repository {model.parent} --name {model.name} --remove-decode` takes away"
    if lost := [one.name for one in three if not (one / CONFIG_FILE).is_file()]:
        raise InputError(
            f"of {', '.join(one.name for one in three)}, which stand around {model.name} together, {lost[0]} is gone; "
            f"{remove} the others"
        )
    prepare, _, pictures = (served_config(one) for one in three)
    differ = [key for key in PREPARED if prepare.parameters[key] != config.parameters[key]]
    if _labels_of(three[1]) != labels:
        differ.append("labels")
    if config.max_batch_size < pictures.max_batch_size:
        differ.append("largest batch")
    if differ:
        raise InputError(
            f"{pictures.name} stands around {model.name}, and this version differs in {', '.join(differ)}; deploy it "
            f"under another --name, or {remove} {', '.join(one.name for one in three)} first"
        )


def _labels_of(names: Path) -> str:
    """What `NAME-labels` calls the classes.

    Raises:
        InputError: its file cannot be read.
    """
    file = names / str(served_version(names)) / LABELS_FILE
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file} cannot be read ({error}); --remove-decode, then deploy with --decode once more"
        ) from None


def _python(settings: ModelSettings, what: str, instances: int) -> Any:
    config = model_config_pb2.ModelConfig(
        name=f"{settings.name}-{what}",
        backend="python",
        default_model_filename="model.py",
        max_batch_size=settings.profile.most,
    )
    config.instance_group.add(count=instances, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    bound_queue(config, settings)  # else pictures that wait would grow without end, each as large as it was sent
    return config


def _answers(config: Any, top: int) -> None:
    config.output.add(name="probabilities", data_type=model_config_pb2.TYPE_FP32, dims=[top])
    config.output.add(name="labels", data_type=model_config_pb2.TYPE_STRING, dims=[top])
    config.output.add(name="indices", data_type=model_config_pb2.TYPE_INT32, dims=[top])


def _set(config: Any, parameters: Mapping[str, str]) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = value
