"""Who prepares the pictures: the server (`NAME-pictures`, fed with files) or its clients, on the same cores.

    python -m lowpass.benchmarks.serving.pictures --out benchmarks/results

JPEGs of 500 x 375 pixels, cut out of scikit-learn's two photographs. The clients are threads of one process beside the
server, over gRPC. Both ways take turns, and a turn's cost is the one over the other. A client that prepares does so as
`lowpass predict`; it gets logits, where the server's own way gets labels.
"""

import io
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tritonclient.grpc
import typer
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from lowpass.benchmarks.latency.machine import describe
from lowpass.benchmarks.rows import RESULTS, Row, write_rows
from lowpass.benchmarks.serving.benchmark import MODELS, free_address, prepare
from lowpass.export.triton.client import Client
from lowpass.export.triton.decode import DecodeLimits
from lowpass.export.triton.predict import preparing
from lowpass.export.triton.prepared import DeployOptions
from lowpass.export.triton.repository import deploy
from lowpass.export.triton.server import Supervisor, find_server
from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.exits import exit_codes
from lowpass.pipeline.base.files import write_bytes
from lowpass.pipeline.base.progress import console

WIDTH, HEIGHT, PICTURES, QUALITY = 500, 375, 16, 90
CLIENTS = 4  # enough to keep two cores busy while some wait
REQUESTS = (1, 8)  # pictures in each
WAYS = ("client", "server")
Ask = Callable[[list[Path]], object]


@dataclass(frozen=True)
class Turns:
    """Pictures a second of each way, turn by turn, with so many pictures a request."""

    together: int
    images_per_s: dict[str, list[float]]

    def cost(self) -> list[float]:
        """Percent of time that the server's way takes over the clients', turn by turn."""
        pairs = zip(self.images_per_s["client"], self.images_per_s["server"], strict=True)
        return [100 * (client / server - 1) for client, server in pairs]


def make_pictures(folder: Path) -> list[Path]:
    """JPEG files, the same every time."""
    draw = np.random.default_rng(0)
    photos = load_sample_images().images
    files = []
    for index in range(PICTURES):
        photo = photos[index % len(photos)]
        top, left = (
            draw.integers(0, full - part + 1) for full, part in zip(photo.shape, (HEIGHT, WIDTH), strict=False)
        )
        content = io.BytesIO()
        Image.fromarray(photo[top : top + HEIGHT, left : left + WIDTH]).save(content, "JPEG", quality=QUALITY)
        files.append(folder / f"{index}.jpg")
        write_bytes(files[-1], content.getvalue())
    return files


def measure(url: str, name: str, files: list[Path], turns: int, seconds: float) -> list[Turns]:
    """Both ways in turns, at each size of a request.

    Raises:
        RunError: the server refused a request.
    """
    client = Client(url, name, "grpc")
    prepared = preparing(client.served)

    def by_client(some: list[Path]) -> object:
        return client.logits(np.stack([prepared(file) for file in some]))

    def by_server(some: list[Path]) -> object:
        contents: NDArray[Any] = np.array([[file.read_bytes()] for file in some], dtype=np.object_)
        given = tritonclient.grpc.InferInput("picture", list(contents.shape), "BYTES")
        given.set_data_from_numpy(contents)
        return client.client.infer(f"{name}-pictures", [given]).as_numpy("labels")

    ways: dict[str, Ask] = {"client": by_client, "server": by_server}
    done = []
    for together in REQUESTS:
        found = Turns(together, {way: [] for way in WAYS})
        for turn in range(turns + 1):
            for way, ask in ways.items():
                rate = _rate(ask, files, together, seconds)
                if turn:  # the first warms up
                    found.images_per_s[way].append(rate)
                    console.print(f"{name}, {together} a request, by the {way}: {rate:.1f} pictures/s", soft_wrap=True)
        done.append(found)
    client.close()
    return done


def _rate(ask: Ask, files: list[Path], together: int, seconds: float) -> float:
    """Pictures a second of all clients, each asking again once answered."""
    counts, failures = [0] * CLIENTS, list[Exception]()
    began = time.perf_counter()

    def work(index: int) -> None:
        try:
            while time.perf_counter() - began < seconds:
                start = (index + counts[index]) % len(files)
                ask((files + files)[start : start + together])
                counts[index] += together
        except Exception as error:  # raised again below, in the thread that asked for it
            failures.append(error)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(CLIENTS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return sum(counts) / (time.perf_counter() - began)


def rows(name: str, done: list[Turns]) -> Iterator[Row]:
    """Medians and quartiles over the turns."""
    for found in done:
        for way, rates in found.images_per_s.items():
            of = {"model": name, "prepared_by": way, "request_images": found.together, "clients": CLIENTS}
            yield Row(of, "images_per_s", *_quartiles(rates))
        of = {"model": name, "prepared_by": "server", "request_images": found.together, "clients": CLIENTS}
        yield Row(of, "cost_percent", *_quartiles(found.cost()))


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    """The median, and the quartiles around it."""
    low, middle, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return middle, low, high


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder of runs and repositories, used again.")] = Path("runs/serving"),
    model: Annotated[str, typer.Option(help="digits or deit_small.")] = "deit_small",
    turns: Annotated[int, typer.Option(min=1, help="Of each way.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.5, help="Of a turn.")] = 8.0,
    triton: Annotated[Path | None, typer.Option(envvar="LOWPASS_TRITON", help="The server's environment.")] = None,
) -> None:
    """What it costs that the server prepares the pictures."""
    if model not in MODELS:
        raise InputError(f"there is no model {model!r}; choose from {', '.join(MODELS)}")
    run = prepare(model, work)
    files = make_pictures(work / "pictures")
    repository = work / f"pictures-{time.time_ns()}"
    deploy(run, repository, model, DeployOptions(decode=DecodeLimits()))
    address = free_address()
    with Supervisor(find_server(triton), repository, address, work / "pictures.log") as supervisor:
        threading.Thread(target=supervisor.watch, daemon=True).start()
        done = measure(f"127.0.0.1:{address.grpc}", model, files, turns, seconds)
    command = shlex.join(["python", "-m", "lowpass.benchmarks.serving.pictures", *sys.argv[1:]])
    write_rows(out / "serving_pictures.csv", rows(model, done), describe(), command)
    for found in done:
        middle, low, high = _quartiles(found.cost())
        console.print(f"{found.together} a request: the server's way costs {middle:+.1f}% ({low:+.1f} to {high:+.1f})")


if __name__ == "__main__":
    with exit_codes():
        typer.run(main)
