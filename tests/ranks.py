"""Processes that work together in a test, as a launcher would start them."""

import io
import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from typing import Any

import tiny  # noqa: F401  registers its models
import torch
from accelerate import PartialState

from lowpass.cli import main

SECONDS = 300


def together(work: Callable[..., object], *arguments: Any, count: int = 2) -> list[Any]:
    """What `work(*arguments)` returns in each of `count` processes, or the error it ends in; None: it was killed."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["lowpass.api", "tiny"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = []
    for number in range(count):
        answer, told = forks.Pipe(duplex=False)
        process = forks.Process(target=_as_one_of, args=(number, count, port, told, work, arguments))
        process.start()
        told.close()
        answers.append((process, answer))
    results = []
    for process, answer in answers:
        try:
            assert answer.poll(SECONDS), "a process does not come to an end"
            results.append(pickle.loads(answer.recv_bytes()))  # noqa: S301 - of a process of ours
        except EOFError:
            results.append(None)
        finally:
            process.join(10)
            process.kill()
    return results


def _as_one_of(
    number: int, count: int, port: int, told: Connection, work: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    try:
        result = work(*arguments)
    except Exception as error:
        result = error
    told.send_bytes(pickle.dumps(result))  # as bytes: torch would hand over the descriptors of tensors
    PartialState(cpu=True).destroy_process_group()


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `lowpass` in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()
