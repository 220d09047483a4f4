"""An operator's bad half hour: deploys, rollbacks, canaries, kills, floods, broken versions and nonsense, at random,
while two clients check every answer.

    python -m lowpass.benchmarks.serving.soak --minutes 30        after `make triton`

Every answer must be one version's logits. What a run leaves is looked at all along: memory and open files of the server
and of who supervises it, and the regions in /dev/shm.
"""

import random
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import psutil
import typer
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.rows import RESULTS, Row, kept_rows, write_rows
from lowpass.benchmarks.serving.benchmark import free_address, prepare
from lowpass.benchmarks.serving.load import INFER, OWN_CONNECTION, request
from lowpass.export.artefacts import open_session
from lowpass.export.runtimes.session import logits_of
from lowpass.export.triton.address import Address
from lowpass.export.triton.canary import abort_canary, promote_canary, start_canary
from lowpass.export.triton.config import as_text, parse_config
from lowpass.export.triton.leftovers import SHARED_MEMORY
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy, prune_versions, roll_back
from lowpass.export.triton.server import Supervisor, find_server
from lowpass.export.triton.version import CONFIG_FILE, serve_version, served_version, versions_of
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.exits import exit_codes
from lowpass.pipeline.base.progress import console
from lowpass.pipeline.data.datasets import made_batches
from lowpass.pipeline.model.slim_vit import SlimViT

NAME, KEPT = "soak", 3
TOLERANCE, TIMEOUT_S = 1e-4, 30.0
SAMPLE_S, PAUSE_S = 10.0, (0.5, 4.0)
RESPITE_S = 0.02  # of who was refused
FLOOD = 64  # clients at once
DOWN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)  # refused, or the server is dead just now
WEIGHTS = {"deploy": 5, "roll back": 5, "prune": 3, "flood": 3, "nonsense": 3, "canary": 3, "broken": 2, "kill": 1}


@dataclass
class Sample:
    """What was there at one moment. Bytes and open files: of the server with all its processes, and of this one."""

    minute: float
    answers: int
    refused: int
    wrong: int
    server_bytes: int
    server_files: int
    own_bytes: int
    own_files: int
    shared_regions: int
    versions: int


@dataclass
class Soak:
    """What is going on, seen by all threads."""

    run: Path
    repository: Path
    address: Address
    supervisor: Supervisor
    images: NDArray[Any]
    wanted: list[NDArray[np.float32]]
    began: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """Of gRPC."""
        return f"127.0.0.1:{self.address.grpc}"


def ask(soak: Soak, infer: Any, message: bytes) -> None:
    """One request, judged."""
    try:
        answer = service_pb2.ModelInferResponse.FromString(infer(message, timeout=TIMEOUT_S))
    except grpc.RpcError as error:
        code = error.code()
        if code in DOWN:
            soak.counts["refused"] += 1
            time.sleep(RESPITE_S)
        else:
            soak.wrong.append(f"{code}: {error.details()}")
        return
    logits = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(len(soak.images), -1)
    distance = min(float(np.abs(logits - one).max()) for one in soak.wanted)
    soak.counts["answers"] += 1
    if not distance < TOLERANCE:
        soak.wrong.append(f"logits are {distance:.2g} from either version's")


def check(soak: Soak) -> None:
    """Ask on and on."""
    message = request(NAME, soak.images)
    with grpc.insecure_channel(soak.url, OWN_CONNECTION) as channel:
        infer = channel.unary_unary(INFER)
        while not soak.done.is_set():
            ask(soak, infer, message)


def sample(soak: Soak) -> Sample:
    """Look once."""
    server_bytes = server_files = 0
    process = soak.supervisor.process
    assert process is not None
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        for one in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                server_bytes += one.memory_info().rss
                server_files += one.num_fds()
    own = psutil.Process()
    return Sample(
        minute=(time.monotonic() - soak.began) / 60,
        answers=soak.counts["answers"],
        refused=soak.counts["refused"],
        wrong=len(soak.wrong),
        server_bytes=server_bytes,
        server_files=server_files,
        own_bytes=own.memory_info().rss,
        own_files=own.num_fds(),
        shared_regions=shared_regions(soak.supervisor.identity),
        versions=len(versions_of(soak.repository / NAME)),
    )


def shared_regions(identity: str) -> int:
    """What of a server's is in /dev/shm; other servers on this machine have their own."""
    return len(list(SHARED_MEMORY.glob(f"*{identity.removeprefix('lowpass-')}*")))


def act(soak: Soak, what: str, draw: random.Random) -> None:
    """One thing that an operator, a client or bad luck does.

    Raises:
        InputError: there was nothing to do it to, such as no version to roll back to.
    """
    one, model = DeployOptions(instances=1, threads=1, queue_limit=16), soak.repository / NAME
    match what:
        case "deploy":
            deploy(soak.run, soak.repository, NAME, one, dense=draw.random() < 0.5)
        case "roll back":
            roll_back(soak.repository, NAME, draw.choice([None, *versions_of(model)]))
        case "prune":
            prune_versions(soak.repository, [NAME], KEPT)
        case "canary":
            start_canary(soak.run, soak.repository, NAME, one, 10)
            time.sleep(draw.uniform(0, 3))
            (promote_canary if draw.random() < 0.5 else abort_canary)(soak.repository, NAME)
        case "broken":
            before = served_version(model)
            assert before is not None
            broken = max(versions_of(model)) + 1
            shutil.copytree(model / str(before), model / str(broken))
            (model / str(broken) / "model.onnx").write_bytes(b"damaged")
            path = model / str(broken) / CONFIG_FILE
            config = parse_config(path.read_text(), str(path))
            config.version_policy.specific.versions[:] = [broken]
            path.write_text(as_text(config))
            serve_version(model, broken)
            time.sleep(draw.uniform(0, 3))
            roll_back(soak.repository, NAME, before)
            shutil.rmtree(model / str(broken))
        case "kill":
            assert soak.supervisor.process is not None
            soak.supervisor.process.send_signal(signal.SIGKILL)
        case "nonsense":
            for _ in range(200):
                with suppress(OSError), socket.create_connection(("127.0.0.1", soak.address.http), timeout=1) as one_:
                    head = f"POST /v2/models/{NAME}/infer HTTP/1.1\r\nContent-Length: {draw.randint(0, 400)}\r\n\r\n"
                    one_.sendall(head.encode() * draw.randint(0, 1) + draw.randbytes(draw.randint(0, 400)))
        case "flood":
            message = request(NAME, soak.images)
            with grpc.insecure_channel(soak.url, OWN_CONNECTION) as channel:
                infer = channel.unary_unary(INFER)
                threads = [threading.Thread(target=ask, args=(soak, infer, message)) for _ in range(FLOOD)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()


def soak_for(soak: Soak, minutes: float, seed: int, told: Callable[[str], None]) -> None:
    """Act at random until the time is up."""
    draw, looked = random.Random(seed), 0.0  # noqa: S311 - chance, no secret
    checkers = [threading.Thread(target=check, args=(soak,)) for _ in range(2)]
    for thread in checkers:
        thread.start()
    try:
        while (passed := time.monotonic() - soak.began) < 60 * minutes:
            (what,) = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))
            try:
                act(soak, what, draw)
                soak.counts[what] += 1
            except InputError:
                pass  # nothing to roll back to
            time.sleep(draw.uniform(*PAUSE_S))
            if passed - looked > SAMPLE_S or not soak.samples:
                soak.samples.append(sample(soak))
                looked = passed
                told(f"{passed / 60:.1f} of {minutes:g} minutes: {dict(soak.counts)}, wrong: {len(soak.wrong)}")
    finally:
        soak.done.set()
        for thread in checkers:
            thread.join()


def rows(soak: Soak, seed: int, left: int) -> Iterator[Row]:
    """How often what was done, what was answered, and every sample; `left` regions in /dev/shm after the end."""
    of = {"seed": seed}
    yield Row(of | {"what": "minutes"}, "times", (time.monotonic() - soak.began) / 60)
    for what in (*WEIGHTS, "answers", "refused"):
        yield Row(of | {"what": what}, "times", soak.counts[what])
    yield Row(of | {"what": "wrong"}, "times", len(soak.wrong))
    yield Row(of | {"what": "restarts"}, "times", soak.supervisor.restarts)
    yield Row(of | {"what": "shared regions left"}, "times", left)
    for one in soak.samples:
        for figure, value in vars(one).items():
            if figure != "minute":
                yield Row(of | {"minute": f"{one.minute:.2f}"}, figure, value)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder of runs and repositories, used again.")] = Path("runs/serving"),
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Of what happens.")] = 0,
    triton: Annotated[Path | None, typer.Option(envvar="LOWPASS_TRITON", help="The server's environment.")] = None,
) -> None:
    """Half an hour of everything at once on a real server."""
    run = prepare("digits", work)
    repository = work / "soak"
    shutil.rmtree(repository, ignore_errors=True)
    deploy(run, repository, NAME, DeployOptions(instances=1, threads=1, queue_limit=16))
    (images, _), *_ = made_batches(SlimViT.load(run).architecture, 4, 4, seed=1)
    batch: NDArray[Any] = images.numpy()
    wanted = [logits_of(open_session("onnxruntime", run, "fp32", dense), batch) for dense in (False, True)]
    address = free_address()

    def tell(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    with Supervisor(find_server(triton), repository, address, work / "soak.log", tell) as supervisor:
        threading.Thread(target=supervisor.watch, daemon=True).start()
        soak = Soak(run, repository, address, supervisor, batch, wanted)
        soak_for(soak, minutes, seed, tell)
        identity = supervisor.identity
    command = f"python -m lowpass.benchmarks.serving.soak --minutes {minutes:g} --seed {seed}"
    path = out / "serving_soak.csv"
    others = kept_rows(path, {"seed": str(seed)})
    write_rows(path, [*others, *rows(soak, seed, shared_regions(identity))], describe(), command)
    for line in soak.wrong[:10]:
        tell(f"wrong: {line}")
    raise typer.Exit(1 if soak.wrong else 0)


if __name__ == "__main__":
    with exit_codes():
        typer.run(main)
