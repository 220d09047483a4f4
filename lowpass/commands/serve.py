"""From an exported model to answers over the network: `deploy`, `serve`, `predict`."""

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from lowpass.commands.common import AsJson, PrecisionOption, RunDirectory, say
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import console

Port = Annotated[int, typer.Option(min=1, max=65535)]


def deploy(
    directory: RunDirectory,
    repository: Annotated[Path, typer.Option(help="Triton model repository; made if missing.")],
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: the run's name.")] = None,
    version: Annotated[int | None, typer.Option(min=1, help="[default: one more than the last]")] = None,
    backend: Annotated[
        Literal["tensorrt", "onnxruntime", "python"],
        typer.Option(help="python: ONNX Runtime on a CPU; the other two as in Triton's own container."),
    ] = "python",
    precision: Annotated[
        PrecisionOption | None, typer.Option(help="Of the exported file. Default: fp16 in tensorrt, else fp32.")
    ] = None,
    with_dense: Annotated[
        bool, typer.Option("--with-dense", help="The dense model too, as NAME-dense, for comparison.")
    ] = False,
    labels: Annotated[
        Path | None, typer.Option(help="Class names, one a line. Default: the data's classes, or numbers.")
    ] = None,
    instances: Annotated[
        int | None, typer.Option(min=1, help="Sessions side by side. Default: 2 in python, else 1.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a session. Default: its share of the cores.")] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Add nothing: serve --version, or the one before the present.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Add the exported model to a Triton repository.

    As a new version; a running server takes it up by itself."""
    from lowpass.export.triton.repository import DeployOptions, serve_version
    from lowpass.export.triton.repository import deploy as deploy_one

    served = name or directory.absolute().name
    names = {served: False} | ({f"{served}-dense": True} if with_dense else {})
    if rollback:
        done = [serve_version(repository, each, version) for each in names]
    else:
        options = DeployOptions(backend, precision, version, labels, instances, threads)
        done = [deploy_one(directory, repository, each, options, dense) for each, dense in names.items()]
    say(
        {"repository": str(repository), "models": [asdict(one) | {"path": str(one.path)} for one in done]},
        "\n".join(f"{one.path}: version {one.version} ({one.backend}), of {list(one.versions)}" for one in done),
        as_json,
    )


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
    log: Annotated[Path | None, typer.Option(help="The server's log. Default: REPO.log.")] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a repository until interrupted; a server that dies is started again."""
    from lowpass.export.triton.server import Address, Supervisor, find_server

    if not repository.is_dir() or not any(repository.glob("*/config.pbtxt")):
        raise InputError(f"{repository} holds no model; `lowpass deploy DIR --repository {repository}` first")
    address = Address(host, http_port, grpc_port, metrics_port)
    where = log or repository.absolute().with_name(repository.absolute().name + ".log")

    def tell(message: str) -> None:
        console.print(message, soft_wrap=True)

    supervisor = Supervisor(find_server(triton), repository, address, where, tell)
    signal.signal(signal.SIGTERM, lambda *_: supervisor.stop())
    with supervisor:
        assert supervisor.process is not None
        ready = {"ready": True, "http": http_port, "grpc": grpc_port, "pid": supervisor.process.pid, "log": str(where)}
        if as_json:
            print(json.dumps(ready | {"host": host}), flush=True)
        else:
            tell(f"ready: HTTP {host}:{http_port}, gRPC {host}:{grpc_port}, log {where}; Ctrl-C stops it")
        try:
            supervisor.watch()
        except KeyboardInterrupt:
            tell("stopping")


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    model: Annotated[str, typer.Option(help="The name it was deployed under.")],
    url: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "127.0.0.1:8000",
    protocol: Annotated[Literal["http", "grpc"], typer.Option(help="gRPC listens on 8001 by default.")] = "http",
    top: Annotated[int, typer.Option(min=1, help="Classes to print of each image.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Ask a served model what is on some images."""
    from lowpass.export.triton.client import Client
    from lowpass.export.triton.client import predict as ask

    client = Client(url, model, protocol)
    try:
        guesses = ask(client, images, top)
    finally:
        client.close()
    lines = [f"{file}: " + ", ".join(f"{g.label} {g.score:.2f}" for g in best) for file, best in guesses.items()]
    found = {str(file): [asdict(guess) for guess in best] for file, best in guesses.items()}
    say({"url": url, "model": model, "predictions": found}, "\n".join(lines), as_json)
