"""An exported model into a Triton repository, and which version of it is served: `deploy`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowpass.commands.common import AsJson, PrecisionOption, say
from lowpass.pipeline.base.errors import InputError

if TYPE_CHECKING:
    from lowpass.export.triton.repository import Deployed, Listed

MOST = 2**31 - 1  # that a configuration holds
MOST_SESSIONS = 1024
VERSIONS, SERVING, TRIAL = "Versions that are there", "How it is served", "A trial first"
PICTURES = "Pictures in, labels out"


def deploy(
    repository: Annotated[Path, typer.Option(help="Triton model repository; made if missing.")],
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="Run directory. Not needed where nothing is added and --name is given."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: the run's name.")] = None,
    version: Annotated[
        int | None, typer.Option(min=1, help="Of what is added, or served again. Default: one more than the last.")
    ] = None,
    with_dense: Annotated[
        bool, typer.Option("--with-dense", help="The dense model too, as NAME-dense, for comparison.")
    ] = False,
    backend: Annotated[
        Literal["tensorrt", "onnxruntime", "python"],
        typer.Option(
            help="python: ONNX Runtime on a CPU; the other two as in Triton's own container.", rich_help_panel=SERVING
        ),
    ] = "python",
    precision: Annotated[
        PrecisionOption | None,
        typer.Option(help="Of the exported file. Default: fp16 in tensorrt, else fp32.", rich_help_panel=SERVING),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Class names, one a line. Default: the data's classes, or numbers.", rich_help_panel=SERVING),
    ] = None,
    instances: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_SESSIONS,
            help="Sessions side by side. Default: 2 in python, else 1.",
            rich_help_panel=SERVING,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_SESSIONS, help="Of a session. Default: its share of the cores.", rich_help_panel=SERVING
        ),
    ] = None,
    queue_limit: Annotated[
        int,
        typer.Option(min=1, max=MOST, help="Requests that may wait; more are refused (503).", rich_help_panel=SERVING),
    ] = 256,
    queue_timeout_ms: Annotated[
        int,
        typer.Option(
            min=0, max=MOST, help="How long one may wait before it is refused; 0: for ever.", rich_help_panel=SERVING
        ),
    ] = 5000,
    accelerator: Annotated[
        Literal["cuda", "tensorrt"],
        typer.Option(
            help="Of --backend onnxruntime on a GPU; tensorrt builds its engines as the server starts.",
            rich_help_panel=SERVING,
        ),
    ] = "cuda",
    decode: Annotated[
        bool,
        typer.Option("--decode", help="NAME-pictures too: JPEG, PNG or WebP in, labels out.", rich_help_panel=PICTURES),
    ] = False,
    decode_bytes: Annotated[
        int, typer.Option(min=1, help="The longest file that it takes.", rich_help_panel=PICTURES)
    ] = 20 * 2**20,
    decode_pixels: Annotated[
        int, typer.Option(min=1, help="The largest picture that it decodes.", rich_help_panel=PICTURES)
    ] = 50_000_000,
    canary: Annotated[
        float | None,
        typer.Option(
            metavar="PERCENT",
            help="Try the new version on this share of what `predict` asks NAME, before it serves all.",
            rich_help_panel=TRIAL,
        ),
    ] = None,
    promote: Annotated[
        bool, typer.Option("--promote", help="Serve the tried version to everybody.", rich_help_panel=TRIAL)
    ] = False,
    abort: Annotated[bool, typer.Option("--abort", help="Take the tried version away.", rich_help_panel=TRIAL)] = False,
    rollback: Annotated[
        bool,
        typer.Option("--rollback", help="Serve --version, or the one before the present.", rich_help_panel=VERSIONS),
    ] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Show them, their figures, and which one serves.", rich_help_panel=VERSIONS)
    ] = False,
    prune: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="KEEP",
            help="Remove all but the newest KEEP, the served one and the one before.",
            rich_help_panel=VERSIONS,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add the exported model to a Triton repository.

    As a new version; a running server takes it up by itself."""
    from lowpass.export.triton.canary import abort_canary, promote_canary, start_canary
    from lowpass.export.triton.decode import DecodeLimits
    from lowpass.export.triton.prepared import DeployOptions
    from lowpass.export.triton.repository import deploy_models, list_versions, prune_versions, roll_back_models

    asked = {
        "--canary": canary is not None,
        "--promote": promote,
        "--abort": abort,
        "--rollback": rollback,
        "--list": list_,
        "--prune": prune is not None,
    }
    if sum(asked.values()) > 1:
        raise InputError(f"{' and '.join(option for option, given in asked.items() if given)}: one at a time")
    if version is not None and any(
        given for option, given in asked.items() if option not in ("--canary", "--rollback")
    ):
        raise InputError(f"--version {version} is for adding a version, --canary and --rollback")
    adds = canary is not None or not any(asked.values())
    if adds and directory is None:
        raise InputError("DIR is missing: the run directory whose exported model is to be deployed")
    if canary is not None and (with_dense or decode or not 0 < canary < 100):
        raise InputError(f"--canary {canary:g} is not between 0 and 100 percent, or beside --with-dense or --decode")
    given = directory.absolute().name if name is None and directory is not None else name
    if list_:
        listed = list_versions(repository, given)
        say(
            {"repository": str(repository), "versions": _as_rows(listed)},
            _as_table(listed) if listed else f"{repository} holds no model",
            as_json,
        )
        return
    if given is None:
        raise InputError("--name is missing: which model of the repository?")
    names = {given: False} | ({f"{given}-dense": True} if with_dense else {})
    if prune is not None:
        removed = prune_versions(repository, list(names), prune)
        text = "\n".join(f"{one.name}: removed version {one.version}" for one in removed) or "nothing to remove"
        say({"repository": str(repository), "removed": _as_rows(removed)}, text, as_json)
        return
    options = DeployOptions(
        backend,
        precision,
        version,
        labels,
        instances,
        threads,
        queue_limit,
        queue_timeout_ms,
        accelerator,
        DecodeLimits(decode_bytes, decode_pixels) if decode else None,
    )
    if promote:
        done = [promote_canary(repository, given)]
    elif abort:
        done = [abort_canary(repository, given)]
    elif rollback:
        done = roll_back_models(repository, list(names), version)
    else:
        assert directory is not None
        if canary is not None:
            done = [start_canary(directory, repository, given, options, canary)]
        else:
            done = deploy_models(directory, repository, names, options)
    _say_done(repository, done, as_json)


def _say_done(repository: Path, done: Sequence["Deployed"], as_json: bool) -> None:
    say(
        {"repository": str(repository), "models": [asdict(one) | {"path": str(one.path)} for one in done]},
        "\n".join(
            f"{one.path}: version {one.version} ({one.backend or 'ensemble'}), of {list(one.versions)}" for one in done
        ),
        as_json,
    )


def _as_rows(listed: Sequence["Listed"]) -> list[dict[str, Any]]:
    return [
        {"name": one.name, "version": one.version, "serves": one.serves}
        | ({} if one.facts is None else one.facts.model_dump(mode="json"))
        for one in listed
    ]


def _as_table(listed: Sequence["Listed"]) -> str:
    """One line a version."""
    rows: list[tuple[str, ...]] = [
        ("model", "version", "", "kind", "precision", "backend", "top-1 %", "GMACs", "batch", "deployed")
    ]
    for one in listed:
        cells: tuple[str, ...] = (one.name, str(one.version), "serves" if one.serves else "")
        facts = one.facts
        if facts is not None:
            top1 = "-" if facts.top1 is None else f"{facts.top1:.2f}"
            cells += (facts.kind, facts.precision, facts.backend, top1, f"{facts.macs / 1e9:.3g}")
            cells += (f"1-{facts.max_batch}", facts.deployed)
        rows.append((*cells, *[""] * (len(rows[0]) - len(cells))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
