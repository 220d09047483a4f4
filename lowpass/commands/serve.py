"""A server on the network: `serve`."""

import json
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowpass.commands.common import AsJson
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import console

if TYPE_CHECKING:
    from lowpass.export.triton.server import Supervisor

Port = Annotated[int, typer.Option(min=1, max=65535)]


def serve(
    repository: Annotated[Path, typer.Argument(metavar="REPO", help="As written by `lowpass deploy`.")],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    http_port: Port = 8000,
    grpc_port: Port = 8001,
    metrics_port: Port = 8002,
    triton: Annotated[
        Path | None,
        typer.Option(
            envvar="LOWPASS_TRITON", help="Virtual environment of the server. Default: .venv-triton, or the PATH's."
        ),
    ] = None,
    log: Annotated[Path | None, typer.Option(help="The server's log. Default: REPO-PORT.log, of HTTP.")] = None,
    dashboard: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of a page of live figures, for this machine alone; 0: none.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Serve a repository until interrupted; a server that dies is started again."""
    from lowpass.export.triton.address import Address
    from lowpass.export.triton.dashboard import Dashboard
    from lowpass.export.triton.server import Supervisor, find_server
    from lowpass.export.triton.writers import check_folder, explained

    check_folder(repository)
    with explained(repository):
        # `glob` would pass over a folder that cannot be read.
        if not repository.is_dir() or not any(repository.iterdir()) or not any(repository.glob("*/config.pbtxt")):
            raise InputError(f"{repository} holds no model; `lowpass deploy DIR --repository {repository}` first")
    address = Address(host, http_port, grpc_port, metrics_port, dashboard or None)
    where = log or repository.absolute().with_name(f"{repository.absolute().name}-{http_port}.log")

    def tell(message: str) -> None:
        console.print(message, soft_wrap=True)

    supervisor = Supervisor(find_server(triton), repository, address, where, tell)
    for ending in (signal.SIGTERM, signal.SIGHUP):  # SIGHUP: the terminal was closed
        signal.signal(ending, lambda *_: supervisor.stop())
    try:
        with supervisor, ExitStack() as beside:
            if supervisor.stopping:
                return
            if address.dashboard is not None:
                beside.enter_context(Dashboard(address, address.dashboard))
            _say_ready(supervisor, as_json)
            try:
                supervisor.watch()
            except KeyboardInterrupt:
                tell("stopping")
    except KeyboardInterrupt:  # before it was ready, or a second time
        tell("stopped")


def _say_ready(supervisor: "Supervisor", as_json: bool) -> None:
    assert supervisor.process is not None
    at, log = supervisor.address, str(supervisor.log)
    if as_json:
        ready = {"ready": True, "http": at.http, "grpc": at.grpc, "metrics": at.metrics, "dashboard": at.dashboard}
        print(json.dumps(ready | {"pid": supervisor.process.pid, "log": log, "host": at.host}), flush=True)
        return
    page = "" if at.dashboard is None else f", dashboard http://127.0.0.1:{at.dashboard}"
    text = f"ready: HTTP {at.host}:{at.http}, gRPC {at.host}:{at.grpc}{page}, log {log}; Ctrl-C stops it"
    console.print(text, soft_wrap=True)
