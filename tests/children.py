"""Processes of their own that are to be killed at a moment of the work, not of their start, which may take longer."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.synchronize import Event
from typing import Any


def say_and_work(begun: Event, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    begun.set()
    work(*arguments)


def started(forks: ForkServerContext, work: Callable[..., object], *arguments: Any) -> ForkServerProcess:
    """A process that has begun with `work(*arguments)`."""
    begun = forks.Event()
    process = forks.Process(target=say_and_work, args=(begun, work, arguments))
    process.start()
    assert begun.wait(120)
    return process


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill it in the end, if it is still there: a test that failed waits for nobody."""
    try:
        yield
    finally:
        process.kill()
