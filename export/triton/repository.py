"""A run's exported model into a Triton model repository, as a new version; and which version is served.

What a version is made of: `version.py`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lowpass.export.triton.client import CANARY_SHARE
from lowpass.export.triton.config import CONFIG_REMEDY, Backend, config_of
from lowpass.export.triton.decode import (
    AROUND,
    around,
    check_pictures,
    check_place,
    label_text,
    stands_around,
    takes_pictures,
)
from lowpass.export.triton.prepared import LAST_VERSION, DeployOptions, Prepared, prepare
from lowpass.export.triton.version import (
    CONFIG_FILE,
    REMEDY,
    SUMS_FILE,
    VersionFacts,
    check_whole,
    checked_name,
    facts_of,
    own_config,
    remove_version,
    serve_version,
    served_config,
    served_version,
    sweep,
    unreadable_configs,
    versions_of,
    write_version,
)
from lowpass.export.triton.writers import check_folder, explained, locked
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger

CANARY = "-canary"


def canary_name(name: str) -> str:
    """What a version of a model that is tried first is served as, see `canary.py`."""
    return name + CANARY


@contextmanager
def writing(repository: Path, names: Iterable[str]) -> Iterator[None]:
    """One writer at a time, once what a killed one left of these models, and of what stands around them, is swept.

    Raises:
        InputError: the repository cannot be written, or another deploy does not end.
    """
    with locked(repository):
        for name in names:
            for one in (name, canary_name(name), *(f"{name}-{what}" for what in AROUND)):
                sweep(repository / one)
        yield


@dataclass(frozen=True)
class Deployed:
    """A model as it now lies in the repository. `versions` are all that are there, `version` the one served."""

    name: str
    version: int
    versions: tuple[int, ...]
    backend: Backend
    path: Path


def deploy(directory: Path, repository: Path, name: str, options: DeployOptions, dense: bool = False) -> Deployed:
    """Add a run's exported model to a repository as a new version, and make it the one that is served.

    Args:
        directory: the run; its ONNX file (or TensorRT engine) must be there and current.
        repository: made if missing.
        name: what clients call the model.
        options: how to serve it.
        dense: the dense model instead.

    Raises:
        InputError: nothing current is exported or built, the engine is for other hardware, the version exists, or the
            repository cannot be written.
        RunError: ONNX Runtime cannot load the file.
    """
    return deploy_models(directory, repository, {name: dense}, options)[0]


def deploy_models(
    directory: Path, repository: Path, models: Mapping[str, bool], options: DeployOptions
) -> list[Deployed]:
    """`deploy` for several models of a run, {name: whether it is the dense one}: all are checked before one is written,
    and all are written before one is served.

    Raises:
        InputError: see `deploy`.
        RunError: see `deploy`.
    """
    prepared = [prepare(directory, name, options, dense) for name, dense in models.items()]
    with writing(repository, models):
        versions = add_versions(repository, prepared, options.version)
        done = [
            served(repository / model.name, version)
            for one, version in zip(prepared, versions, strict=True)
            for model in one.models(version)
        ]
        for name in models:
            if options.decode is None and takes_pictures(repository / name):
                logger.info("%s-pictures stands around this version, too; --remove-decode takes it away", name)
    return done


def add_versions(repository: Path, prepared: Sequence[Prepared], wanted: int | None) -> list[int]:
    """Write models as new versions that are not served yet, with what stands around them; all or none. The caller holds
    the lock.

    Raises:
        InputError: a version exists, a folder of that name is no model, or the version does not go with what stands
            around the model.
    """
    versions = [_free_version(repository, [each.name for each in one.models(1)], wanted) for one in prepared]
    for one, version in zip(prepared, versions, strict=True):
        settings = one.settings
        if around := stands_around(repository / settings.name):
            raise InputError(f"{settings.name} stands around {around}, see --decode; give another --name")
        if one.decode is not None:
            check_place(repository / settings.name)
        check_pictures(repository / settings.name, config_of(settings, version), label_text(one.labels))
    written: list[tuple[Path, int]] = []
    try:
        for one, version in zip(prepared, versions, strict=True):
            for model in one.models(version):
                write_version(repository, version, model)
                written.append((repository / model.name, version))
    except BaseException:
        for folder, version in written:
            remove_version(folder, version)
        raise
    return versions


def _free_version(repository: Path, names: Sequence[str], wanted: int | None) -> int:
    models = [repository / name for name in names]
    for model in models:
        if model.exists() and not (model / CONFIG_FILE).exists() and foreign(model):
            raise InputError(f"{model} is there and holds no {CONFIG_FILE}; give another --name")
        if (model / CONFIG_FILE).exists() and CANARY_SHARE in served_config(model).parameters:
            raise InputError(f"{model.name} is a model on trial; --promote or --abort it, or give another --name")
    present = {version: model for model in models for version in versions_of(model)}
    version = wanted or max(present, default=0) + 1
    if version > LAST_VERSION:
        raise InputError(f"{models[0]} holds version {version - 1}, the last there can be; give a lower --version")
    if version in present:
        raise InputError(
            f"{present[version]} already holds version {version}; give another --version, or --rollback to serve it"
        )
    return version


def foreign(model: Path) -> bool:
    """Whether a folder without a configuration holds more than a deploy leaves that was killed."""
    if not model.exists():
        return False
    return not model.is_dir() or any(
        not entry.name.startswith(".") and not (entry / CONFIG_FILE).is_file() for entry in model.iterdir()
    )


def roll_back(repository: Path, name: str, version: int | None = None) -> Deployed:
    """Serve another version that is already there, with its own batch limit, preprocessing, labels and warm-up.

    Args:
        repository: of the model.
        name: of the model.
        version: None: the one before the present.

    Raises:
        InputError: there is no such model or version, or it has no configuration of its own.
    """
    (done,) = roll_back_models(repository, [name], version)
    return done


def roll_back_models(repository: Path, names: Sequence[str], version: int | None = None) -> list[Deployed]:
    """`roll_back` for several models: all are checked before one is switched.

    Raises:
        InputError: see `roll_back`.
    """
    with explained(repository):
        for name in names:
            if version is None or not versions_of(repository / checked_name(name)):  # else even without a configuration
                existing(repository, name)
        with writing(repository, names):
            chosen = {repository / name: _earlier(repository / name, version) for name in names}
            for model, one in chosen.items():
                check_version(model, one)
            return [served(model, one) for model, one in chosen.items()]


def _earlier(model: Path, version: int | None) -> int:
    present = versions_of(model)
    if version is not None:  # whatever is served: also where somebody damaged the configuration that says so
        chosen, wanted = version, f"version {version}"
    else:
        now, tried = served_version(model) or 0, served_version(model.with_name(canary_name(model.name)))
        # What is on trial was never served to everybody.
        chosen = max((one for one in present if one < now and one != tried), default=0)
        wanted = f"version before {now}"
    if chosen not in present:
        raise InputError(f"{model} has no {wanted}; there are {', '.join(map(str, present))}")
    return chosen


def existing(repository: Path, name: str) -> Path:
    """The folder of a model that is there.

    Raises:
        InputError: it is not.
    """
    model = repository / checked_name(name)
    check_folder(repository)
    if not (model / CONFIG_FILE).is_file():
        raise InputError(f"there is no model {name} in {repository}; `lowpass deploy DIR --repository {repository}`")
    return model


def check_version(model: Path, version: int, remedy: str = REMEDY) -> None:
    """That a version that is there can be served: it loaded when it was deployed, and none of its files has changed.

    Raises:
        InputError: it has no configuration of its own, a file is damaged, or it does not go with what stands around
            the model; the message ends with `remedy`.
    """
    config = own_config(model, version, remedy)
    if not check_whole(model, version, remedy) and facts_of(model, version) is not None:
        raise InputError(f"{model / str(version)} has lost its {SUMS_FILE}; {remedy}")
    if labels := config.output[0].label_filename:  # what stands around a model has none
        try:
            text = (model / labels).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{model / labels} cannot be read ({error}); {remedy}") from None
        check_pictures(model, config, text)


def served(model: Path, version: int) -> Deployed:
    """Make a version that is there, and was checked, the one that is served."""
    serve_version(model, version)
    return as_it_is(model)


def as_it_is(model: Path) -> Deployed:
    """A model as it is served."""
    config = served_config(model)
    version = max(config.version_policy.specific.versions)  # somebody may have several served
    return Deployed(model.name, version, versions_of(model), cast(Backend, config.backend), model)


@dataclass(frozen=True)
class Listed:
    """One version in a repository. `facts` is None where lowpass did not deploy it."""

    name: str
    version: int
    serves: bool
    facts: VersionFacts | None


def list_versions(repository: Path, name: str | None = None) -> list[Listed]:
    """Every version of every model, or of one. Of a model that is damaged, see `damaged_models`, none serves.

    Raises:
        InputError: there is no such repository or model.
    """
    with explained(repository):
        check_folder(repository)
        if name is not None:
            models = [existing(repository, name)]
        elif repository.is_dir():
            any(repository.iterdir())  # `glob` would pass over a folder that cannot be read
            found = [*repository.glob(f"*/{CONFIG_FILE}"), *repository.glob(f"*/*/{CONFIG_FILE}")]
            models = sorted({repository / path.relative_to(repository).parts[0] for path in found})
        else:
            raise InputError(f"there is no repository {repository}")
    listed = []
    for model in models:
        try:
            serves, present = served_version(model), versions_of(model)
        except InputError:
            serves, present = None, versions_of(model)
        except OSError:  # another user's
            continue
        listed += [Listed(model.name, one, one == serves, facts_of(model, one)) for one in present]
    return listed


def damaged_models(repository: Path, name: str | None = None) -> dict[str, str]:
    """The models of a repository, or the one, that a server cannot follow; why, with the remedy."""
    found = unreadable_configs(repository)
    return {path.parent.name: why for path, why in found.items() if name in (None, path.parent.name)}


def prune_versions(repository: Path, names: Sequence[str], keep: int) -> list[Listed]:
    """Remove the oldest versions of models, but `keep` of each, the one that is served, the one before it (which serves
    on where that does not load, and is the way back), and a canary's.

    Returns:
        What was removed.

    Raises:
        InputError: there is no such model, or nothing says which of its versions serves.
    """
    with explained(repository):
        models = [existing(repository, name) for name in names]
        models += [one for model in models for one in around(model)]
        with writing(repository, names):
            for model in models:
                if served_version(model) is None:
                    raise InputError(f"{model / CONFIG_FILE} does not say which version serves; {CONFIG_REMEDY}")
            return [removed for model in models for removed in _prune(model, keep)]


def _prune(model: Path, keep: int) -> list[Listed]:
    # Somebody may have several served.
    used: set[int | None] = {*served_config(model).version_policy.specific.versions}
    used.add(served_version(model.with_name(canary_name(model.name))))
    used.add(max((one for one in versions_of(model) if one < (served_version(model) or 0)), default=None))
    removed = []
    for version in versions_of(model)[:-keep]:
        if version not in used:
            removed.append(Listed(model.name, version, False, facts_of(model, version)))
            remove_version(model, version)
    return removed
