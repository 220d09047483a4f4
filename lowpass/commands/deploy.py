"""An exported model into a Triton repository, and which version of it is served: `deploy`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lowpass.commands.common import AsJson, PrecisionOption, say
from lowpass.commands.given import given, refuse, refuse_all_but
from lowpass.pipeline.base.errors import InputError, RunError

if TYPE_CHECKING:
    from lowpass.export.triton.repository import Deployed, Listed

MOST = 2**31 - 1  # that a configuration holds
MOST_SESSIONS = 1024
VERSIONS, SERVING, TRIAL = "Versions that are there", "How it is served", "A trial first"
PICTURES = "Pictures in, labels out"

# What goes with each way to call `deploy` that adds nothing, and with all of them.
BESIDE = {
    "--promote": ("promote",),
    "--abort": ("abort",),
    "--rollback": ("rollback", "version", "with_dense"),
    "--list": ("list_",),
    "--prune": ("prune", "with_dense"),
    "--remove-decode": ("remove_decode", "with_dense"),
}
ALWAYS = ("repository", "directory", "name", "as_json")


def deploy(
    context: typer.Context,
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
    remove_decode: Annotated[
        bool,
        typer.Option(
            "--remove-decode", help="Take away what --decode put around NAME; NAME serves on.", rich_help_panel=PICTURES
        ),
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
    from lowpass.export.triton.removal import remove_decode as take_away
    from lowpass.export.triton.repository import deploy_models, prune_versions, roll_back_models

    asked = {
        "--canary": canary is not None,
        "--promote": promote,
        "--abort": abort,
        "--rollback": rollback,
        "--list": list_,
        "--prune": prune is not None,
        "--remove-decode": remove_decode,
    }
    wanted = [option for option, is_given in asked.items() if is_given]
    if len(wanted) > 1:
        raise InputError(f"{' and '.join(wanted)}: one at a time")
    _refuse_idle(context, next(iter(wanted), None), backend)
    adds = canary is not None or not wanted
    if adds and directory is None:
        raise InputError("DIR is missing: the run directory whose exported model is to be deployed")
    name = directory.absolute().name if name is None and directory is not None else name
    if list_:
        _list(repository, name, as_json)
        return
    if name is None:
        raise InputError("--name is missing: which model of the repository?")
    names = {name: False} | ({f"{name}-dense": True} if with_dense else {})
    if prune is not None:
        removed = prune_versions(repository, list(names), prune)
        text = "\n".join(f"{one.name}: removed version {one.version}" for one in removed) or "nothing to remove"
        say({"repository": str(repository), "removed": _as_rows(removed)}, text, as_json)
        return
    if remove_decode:
        gone = [folder.name for folder in take_away(repository, list(names))]
        said = "\n".join(f"{one}: removed" for one in gone)
        say({"repository": str(repository), "removed": [{"name": one} for one in gone]}, said, as_json)
        return
    if promote:
        done = [promote_canary(repository, name)]
    elif abort:
        done = [abort_canary(repository, name)]
    elif rollback:
        done = roll_back_models(repository, list(names), version)
    else:
        assert directory is not None
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
        if canary is not None:
            done = [start_canary(directory, repository, name, options, canary)]
        else:
            done = deploy_models(directory, repository, names, options)
    _say_done(repository, done, as_json)


def _refuse_idle(context: typer.Context, action: str | None, backend: str) -> None:
    """Refuse options that would have no effect beside others.

    Raises:
        InputError: there are some.
    """
    given_names = given(context)
    if "version" in given_names and action not in (None, "--canary", "--rollback"):
        raise InputError(f"--version {context.params['version']} is for adding a version, --canary and --rollback")
    if action in BESIDE:
        refuse_all_but(context, (*ALWAYS, *BESIDE[action]), f"{{}}: without effect beside {action}; leave that out")
    elif action == "--canary":
        refuse(context, ("with_dense", "decode"), "{}: not for --canary, which tries NAME alone; leave that out")
    if "decode" not in given_names:
        refuse(context, ("decode_bytes", "decode_pixels"), "{}: for --decode alone; give that, too, or leave this out")
    if backend != "onnxruntime" and context.params["accelerator"] == "cuda":
        refuse(context, ("accelerator",), f"{{}} cuda is for --backend onnxruntime, not for {backend}; leave it out")


def _list(repository: Path, name: str | None, as_json: bool) -> None:
    """Say what is there, as far as it can be read.

    Raises:
        RunError: some of it is damaged; said after the rest.
    """
    from lowpass.export.triton.repository import damaged_models, list_versions

    listed, damaged = list_versions(repository, name), damaged_models(repository, name)
    say(
        {"repository": str(repository), "versions": _as_rows(listed), "damaged": damaged},
        _as_table(listed) if listed else f"{repository} holds no model" + (" that can be listed" if damaged else ""),
        as_json,
    )
    if damaged:
        raise RunError(f"damaged: {'; '.join(damaged.values())}")


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
