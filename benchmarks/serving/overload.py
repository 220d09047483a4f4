"""More requests than a served model can answer: what it still answers, how late, and how soon it is well again."""

import os
import threading
import time
from collections import Counter
from typing import Any

import grpc
import numpy as np
import psutil
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from lowpass.benchmarks.serving.load import (
    INFER,
    OWN_CONNECTION,
    REFUSED,
    TIMEOUT_S,
    RefusedError,
    closed_loop,
    request,
)
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.progress import console

ATTEMPTS = 3  # at a closed loop
TURNS = 3  # of measuring the capacity and flooding, side by side
CALM, SETTLED = 5, 2.0  # requests that tell how fast one alone is; how many times that counts as well again
RECOVERY_S = 30.0


class Overload(BaseModel):
    """One flood. `capacity` is what closed loops reached, `offered` what was sent, `goodput` what was answered, all in
    requests a second; milliseconds are of the answered. `recovery_s` is how long after the last request was sent one
    alone is answered as fast as before; bytes are the server's with all its processes, before and at most. `kept` is
    goodput over capacity. Who asks takes cores of the same machine, `clients_cores` in the flood and
    `clients_cores_calm` in the closed loops; `kept_a_core` is `kept` by what is left of the cores both times."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    capacity: float
    offered: float
    goodput: float
    refused_share: float
    p50_ms: float
    p99_ms: float
    recovery_s: float
    bytes_before: int
    bytes_peak: int
    kept: float
    kept_a_core: float
    clients_cores: float
    clients_cores_calm: float


def overload(url: str, model: str, images: NDArray[Any], seconds: float, server: int, times: float = 2.0) -> Overload:
    """`times` the capacity for `seconds`, by the clock, whether or not anything is answered.

    Args:
        url: of gRPC.
        model: that is served there.
        images: of each request, [B, ...].
        seconds: of the flood.
        server: the server's process.
        times: its capacity.

    Raises:
        RunError: a request failed otherwise than by being refused, or the server is not well again.
    """
    calm_cores = _Cores()
    capacity = max(_answered(url, model, images, clients, seconds) for clients in (4, 8))
    clients_cores_calm = calm_cores.taken()
    message = request(model, images)
    with grpc.insecure_channel(url, OWN_CONNECTION) as channel:
        infer = channel.unary_unary(INFER)
        calm = float(np.median([_seconds(infer, message) for _ in range(CALM)]))
        codes: Counter[str] = Counter()
        took, lock = list[float](), threading.Lock()
        process = psutil.Process(server)
        before = peak = _bytes(process)

        def done(call: Any, sent: float) -> None:
            with lock:
                code = call.code()
                codes["answered" if code is grpc.StatusCode.OK else "refused" if code in REFUSED else str(code)] += 1
                if code is grpc.StatusCode.OK:
                    took.append(time.perf_counter() - sent)

        rate = times * capacity
        due = np.cumsum(np.random.default_rng(0).exponential(1 / rate, max(2, round(rate * seconds))))
        began, calls, looked, cores = time.perf_counter(), list[Any](), 0.0, _Cores()
        for moment in due.tolist():
            time.sleep(max(0.0, began + moment - time.perf_counter()))
            sent = time.perf_counter()
            call = infer.future(message, timeout=TIMEOUT_S)
            call.add_done_callback(lambda call, sent=sent: done(call, sent))
            calls.append(call)
            if sent - looked > 0.5:
                peak, looked = max(peak, _bytes(process)), sent
        ended, clients_cores = time.perf_counter(), cores.taken()
        while _seconds(infer, message) > SETTLED * calm:
            if time.perf_counter() - ended > RECOVERY_S:
                raise RunError(f"{model} is not well again {RECOVERY_S:.0f} s after a flood")
        recovery = time.perf_counter() - ended
        for call in calls:
            call.exception()  # waits for it
        while codes.total() < len(calls):  # a call is over before what was asked to be done then is
            time.sleep(0.01)
    if others := {code: count for code, count in codes.items() if code not in ("answered", "refused")}:
        raise RunError(f"{model} failed under {rate:.1f} requests/s: {others}")
    p50, p99 = (float(value) for value in np.percentile(1000 * np.asarray(took), [50, 99]))
    goodput, all_cores = codes["answered"] / (ended - began), len(os.sched_getaffinity(0))
    return Overload(
        capacity=capacity,
        offered=len(calls) / (ended - began),
        goodput=goodput,
        refused_share=codes["refused"] / len(calls),
        p50_ms=p50,
        p99_ms=p99,
        recovery_s=recovery,
        bytes_before=before,
        bytes_peak=max(peak, _bytes(process)),
        kept=goodput / capacity,
        kept_a_core=goodput / capacity * (all_cores - clients_cores_calm) / (all_cores - clients_cores),
        clients_cores=clients_cores,
        clients_cores_calm=clients_cores_calm,
    )


def _answered(url: str, model: str, images: NDArray[Any], clients: int, seconds: float) -> float:
    """Requests a second that so many clients get answered. Fewer of them than the queue takes are refused only where
    the machine stood still for as long as a request may wait: then they begin anew."""
    for _ in range(ATTEMPTS - 1):
        try:
            return closed_loop(url, model, images, clients, seconds).images_per_s / len(images)
        except RefusedError as error:
            console.print(f"{error}; {clients} clients begin anew", soft_wrap=True)
    return closed_loop(url, model, images, clients, seconds).images_per_s / len(images)


class _Cores:
    """How many cores this process has kept busy since this was made."""

    def __init__(self) -> None:
        self._began, self._busy = time.perf_counter(), time.process_time()

    def taken(self) -> float:
        return (time.process_time() - self._busy) / (time.perf_counter() - self._began)


def _seconds(infer: Any, message: bytes) -> float:
    """Of one request; one that is refused did not come through in any time."""
    began = time.perf_counter()
    try:
        infer(message, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() not in REFUSED:
            raise RunError(f"a request failed: {error}") from None
        return float("inf")
    return time.perf_counter() - began


def _bytes(process: psutil.Process) -> int:
    """Resident memory of a process and all below it."""
    return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
