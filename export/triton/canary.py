"""A new version tried on a share of the requests before it serves all.

The new version is written beside the others as usual, and served as a model of its own, NAME-canary, whose
configuration says the share. Triton has no router, so the clients split: `predict` asks NAME-canary with that share of
its batches. Promoting serves the very folder that was tried; aborting removes it.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowpass.export.triton.client import CANARY_SHARE
from lowpass.export.triton.config import CONFIG_REMEDY, config_of
from lowpass.export.triton.decode import label_text
from lowpass.export.triton.prepared import DeployOptions, Prepared, prepare
from lowpass.export.triton.removal import remove_model
from lowpass.export.triton.repository import (
    Deployed,
    add_versions,
    as_it_is,
    canary_name,
    check_version,
    existing,
    foreign,
    served,
    writing,
)
from lowpass.export.triton.version import (
    CONFIG_FILE,
    ModelVersion,
    remove_version,
    serve_version,
    served_config,
    served_version,
    versions_of,
    write_version,
)
from lowpass.export.triton.writers import explained
from lowpass.pipeline.base.errors import InputError

SHARED_PARAMETERS = ("input", "input_size", "preprocessing")


def start_canary(directory: Path, repository: Path, name: str, options: DeployOptions, share: float) -> Deployed:
    """Add a run's exported model as a new version and serve it as NAME-canary for a share of the requests.

    Args:
        directory: the run.
        repository: where NAME is served already.
        name: of the model.
        options: how to serve it.
        share: in percent, above 0 and below 100.

    Raises:
        InputError: the share is none, NAME is not there, takes other inputs, or has a canary already; and see `deploy`.
        RunError: see `deploy`.
    """
    if not 0 < share < 100:
        raise InputError(f"--canary {share:.15g} is not between 0 and 100 percent; give a share such as 10")
    prepared = prepare(directory, name, options, dense=False)
    with explained(repository):
        model, canary = existing(repository, name), repository / canary_name(name)
        with writing(repository, [name]):
            version = _start(model, canary, prepared, options.version, share)
    return Deployed(canary.name, version, versions_of(model), options.backend, canary)


def _start(model: Path, canary: Path, prepared: Prepared, wanted: int | None, share: float) -> int:
    """Write and serve it; its version. The caller holds the lock."""
    name, repository = model.name, model.parent
    if (canary / CONFIG_FILE).exists() or foreign(canary):  # a start that was killed leaves less
        tried = served_version(canary) if _is_canary(canary) else None
        raise InputError(
            f"{canary} is no canary of {name}, and in its place; rename or remove it first"
            if tried is None
            else f"{name} has a canary, version {tried}; --promote or --abort it first"
        )
    if _interface(served_config(model)) != _interface(config_of(prepared.settings, 1)):
        raise InputError(
            f"{name} takes other inputs or has other classes than the new version, so that requests cannot be "
            "split between them; deploy it without --canary, or under another --name"
        )
    _check_labels(model, prepared.labels)
    # As exactly as it was given: 99.99999999 is not 100.
    parameters = prepared.settings.parameters | {CANARY_SHARE: repr(float(share)).removesuffix(".0")}
    settings = replace(prepared.settings, name=canary.name, parameters=parameters)
    (version,) = add_versions(repository, [prepared], wanted)
    try:
        write_version(repository, version, ModelVersion(canary.name, config_of(settings, version), prepared.files))
        serve_version(canary, version)
    except BaseException:
        shutil.rmtree(canary, ignore_errors=True)
        remove_version(model, version)
        raise
    return version


def _check_labels(model: Path, labels: Sequence[str]) -> None:
    """That the classes are not the same in another order: answers are compared by number. Other names are a change that
    a new version may make."""
    served_labels = model / served_config(model).output[0].label_filename
    try:
        served_text = served_labels.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{served_labels} cannot be read ({error}); `--rollback --version N` mends it") from None
    new_text = label_text(labels)
    if new_text != served_text and sorted(new_text.splitlines()) == sorted(served_text.splitlines()):
        raise InputError(
            f"{model.name} has the new version's classes in another order ({served_labels}), so that answers cannot be "
            "compared; deploy it without --canary, or with the same --labels"
        )


def _interface(config: Any) -> tuple[Any, ...]:
    outputs = [(one.name, one.data_type, tuple(one.dims)) for one in config.output]
    parameters = [config.parameters[key].string_value for key in SHARED_PARAMETERS]
    return list(config.input), outputs, parameters


def promote_canary(repository: Path, name: str) -> Deployed:
    """Serve the tried version to everybody.

    Raises:
        InputError: there is no canary.
    """
    with explained(repository):
        existing(repository, name)
        with writing(repository, [name]):
            model, canary, version = _tried(repository, name)
            remedy = "--abort takes the tried version away; then try the run once more"
            check_version(model, version, remedy)
            done = served(model, version)
            remove_model(canary, model)
    return done


def abort_canary(repository: Path, name: str) -> Deployed:
    """Remove the tried version; what is served stays.

    Raises:
        InputError: there is no canary.
    """
    with explained(repository):
        existing(repository, name)
        with writing(repository, [name]):
            model, canary, version = _tried(repository, name)
            if served_version(model) is None:  # before anything is removed
                raise InputError(f"{model / CONFIG_FILE} does not say which version serves; {CONFIG_REMEDY}")
            remove_model(canary, model)
            if version != served_version(model) and version in versions_of(model):
                remove_version(model, version)
            return as_it_is(model)


def _tried(repository: Path, name: str) -> tuple[Path, Path, int]:
    model, canary = existing(repository, name), repository / canary_name(name)
    version = served_version(canary) if _is_canary(canary) else None
    if version is None:
        raise InputError(f"{name} has no canary in {repository}; --canary PERCENT starts one")
    return model, canary, version


def _is_canary(canary: Path) -> bool:
    """Whether it was made by `start_canary`: a model of somebody's may have such a name."""
    return (canary / CONFIG_FILE).is_file() and CANARY_SHARE in served_config(canary).parameters
