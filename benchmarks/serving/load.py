"""Load on a served model over gRPC: closed-loop (each client asks again once answered) and open-loop (by the clock)."""

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from tritonclient.grpc import service_pb2

from lowpass.export.triton.client import Client
from lowpass.pipeline.base.errors import RunError

MOST_REQUESTS = 20_000  # of one point
TIMEOUT_S = 120.0  # of a request
COUNTED_S = 10.0  # at most, until the server has counted what it answered
INFER = "/inference.GRPCInferenceService/ModelInfer"
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
REFUSED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
Send = Callable[[], object]
Statistics = tuple[int, int, int, int, dict[int, int]]


class RefusedError(RunError):
    """A bounded queue was full, or a request waited in it for too long."""


class Point(BaseModel):
    """One load on one model. `offered`: concurrent clients (closed) or requests a second (open), each request of
    `request_images`. Milliseconds are of a request as a client sees it; queue and compute are the server's own means,
    `mean_batch` what its batcher formed. Compute is None where the server's own sum fell: Triton has been seen to count
    an execution as ending before it began."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    offered: float
    request_images: int
    images_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    requests: int
    mean_batch: float
    queue_ms: float
    compute_ms: float | None
    batches: dict[int, int]  # size -> how often


def closed_loop(url: str, model: str, images: NDArray[Any], clients: int, seconds: float) -> Point:
    """`clients` at once, each sending `images` [B, ...] again and again.

    Raises:
        RefusedError: a request was refused.
        RunError: a request failed otherwise.
    """
    end = time.perf_counter() + seconds

    def ask(send: Send, took: list[float]) -> None:
        while time.perf_counter() < end and len(took) < MOST_REQUESTS // clients:
            began = time.perf_counter()
            send()
            took.append(time.perf_counter() - began)

    return _measured("closed", clients, url, model, images, clients, ask)


def open_loop(url: str, model: str, images: NDArray[Any], rate: float, seconds: float, clients: int) -> Point:
    """`rate` requests a second at random moments (Poisson) whether or not earlier ones are answered, by as many as
    `clients`; a request's time counts from when it was due.

    Raises:
        RunError: a request failed.
    """
    count = min(MOST_REQUESTS, max(2, round(rate * seconds)))
    due = np.cumsum(np.random.default_rng(0).exponential(1 / rate, count))
    turn, lock, began = iter(due.tolist()), threading.Lock(), time.perf_counter()

    def ask(send: Send, took: list[float]) -> None:
        while True:
            with lock:
                moment = next(turn, None)
            if moment is None:
                return
            time.sleep(max(0.0, began + moment - time.perf_counter()))
            send()
            took.append(time.perf_counter() - began - moment)

    return _measured("open", rate, url, model, images, clients, ask)


def request(model: str, images: NDArray[Any]) -> bytes:
    """The message that asks for the logits of `images` [B, ...] FP32. Made once: who makes load on the server's own
    cores should take little of them."""
    message = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[images.tobytes()])
    message.inputs.add(name="images", datatype="FP32", shape=images.shape)
    return bytes(message.SerializeToString())


def _measured(
    kind: str,
    offered: float,
    url: str,
    model: str,
    images: NDArray[Any],
    clients: int,
    ask: Callable[[Send, list[float]], None],
) -> Point:
    message = request(model, images)
    took: list[list[float]] = [[] for _ in range(clients)]
    failures: list[Exception] = []

    def work(index: int) -> None:
        try:
            with grpc.insecure_channel(url, OWN_CONNECTION) as channel:
                infer = channel.unary_unary(INFER)
                ask(lambda: infer(message, timeout=TIMEOUT_S), took[index])
        except Exception as error:  # raised again below, in the thread that asked for it
            failures.append(error)

    observer = Client(url, model, "grpc")
    before, began = _settled(observer), time.perf_counter()
    workers = [threading.Thread(target=work, args=(index,)) for index in range(clients)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lasted = time.perf_counter() - began
    after = _settled(observer, before[0] + len(images) * sum(len(times) for times in took))
    observer.close()
    if failures:
        refused = isinstance(failures[0], grpc.RpcError) and failures[0].code() in REFUSED
        kind_of_error = RefusedError if refused else RunError
        raise kind_of_error(f"{model} under {kind} load of {offered:g}: {failures[0]}")
    every = 1000 * np.concatenate([np.asarray(times) for times in took])
    p50, p95, p99 = (float(value) for value in np.percentile(every, [50, 95, 99]))
    (inferences, runs, queue, compute, sizes), (i0, r0, q0, c0, s0) = after, before
    return Point(
        kind=kind,
        offered=offered,
        request_images=len(images),
        images_per_s=len(every) * len(images) / lasted,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        requests=len(every),
        mean_batch=(inferences - i0) / max(1, runs - r0),
        queue_ms=(queue - q0) / 1e6 / len(every),
        compute_ms=(compute - c0) / 1e6 / len(every) if compute > c0 else None,
        batches={size: n for size in sorted(sizes) if (n := sizes[size] - s0.get(size, 0))},
    )


def _settled(client: Client, images: int = 0) -> Statistics:
    """What `client`'s model has done. The server answers first and counts afterwards, so this waits until all of
    `images` are counted, in the total as by batch size, and two looks see the same."""
    end, last = time.perf_counter() + COUNTED_S, None
    while True:
        now = _statistics(client)
        counted, sizes = now[0], now[-1]
        if (last == now and counted >= images and counted == sum(size * runs for size, runs in sizes.items())) or (
            time.perf_counter() > end
        ):
            return now
        last = now
        time.sleep(0.02)


def _statistics(client: Client) -> Statistics:
    """Images, executions, nanoseconds in queue and in compute, executions by batch size; since the model was loaded."""
    one = client.client.get_inference_statistics(client.model).model_stats[-1]
    sizes = {int(entry.batch_size): int(entry.compute_infer.count) for entry in one.batch_stats}
    stats = one.inference_stats
    return int(one.inference_count), int(one.execution_count), int(stats.queue.ns), int(stats.compute_infer.ns), sizes
