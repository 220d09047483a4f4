"""Progress and log of long work. Nothing is printed unless somebody listens: `report_to` a function of the caller's, or
`show_on_console`, which the commands do. The log is `logging.getLogger("lowpass")`."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lowpass.pipeline.base.launched import is_first

console = Console(stderr=True, highlight=False, markup=False)  # standard output is the answer's
logger = logging.getLogger("lowpass")
logger.addHandler(logging.NullHandler())
T = TypeVar("T")
LINE_EVERY_S = 30.0  # between two lines of progress where no bar can be drawn


@dataclass(frozen=True)
class Step:
    """How far a piece of long work has come: `done` of `total` items (None: nobody knows how many)."""

    description: str
    done: int
    total: int | None
    finished: bool = False  # the last that is heard of it


Listener = Callable[[Step], None]
_listener: ContextVar[Listener | None] = ContextVar("lowpass_progress", default=None)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, and tell whoever listens how many are done."""
    listener = _listener.get()
    if listener is None:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    done = 0
    listener(Step(description, done, total))
    try:
        for item in items:
            yield item
            done += 1
            listener(Step(description, done, total))
    finally:
        listener(Step(description, done, total, finished=True))


@contextmanager
def report_to(listener: Listener | None) -> Iterator[None]:
    """Within, `track` tells `listener`; None: whoever listens already."""
    if listener is None:
        yield
        return
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


@contextmanager
def show_on_console() -> Iterator[None]:
    """Within, the log and progress go to standard error: bars on a terminal, elsewhere a line now and then. Of several
    processes that were started together the first alone is heard."""
    if not is_first():
        yield
        return
    handler = _ConsoleHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # A library that calls logging.info() gives the root logger a handler, which would say our lines once more.
    root, others = logging.getLogger(), logging.StreamHandler()
    others.addFilter(lambda record: record.name.split(".")[0] != logger.name)
    if not root.handlers:
        root.addHandler(others)
    try:
        if not console.is_terminal:
            with report_to(_lines()):
                yield
            return
        with _bars() as progress, report_to(_drawing(progress)):
            yield
    finally:
        root.removeHandler(others)
        logger.removeHandler(handler)
        logger.setLevel(level)


class _ConsoleHandler(logging.Handler):
    """Messages as they are: a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(record.getMessage(), soft_wrap=True)


def _bars() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # Bars move out of the way of what is printed to the same terminal. An answer that goes elsewhere stays there: Rich
    # would send it to the terminal as well.
    return Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())


def _drawing(progress: Progress) -> Listener:
    tasks: dict[str, TaskID] = {}

    def draw(step: Step) -> None:
        if step.description not in tasks:
            tasks[step.description] = progress.add_task(step.description, total=step.total)
        progress.update(tasks[step.description], completed=step.done)
        if step.finished:
            progress.remove_task(tasks.pop(step.description))

    return draw


def _lines() -> Listener:
    began: dict[str, tuple[float, float]] = {}  # description -> when it began, when it was last told of

    def tell(step: Step) -> None:
        now = time.monotonic()
        start, told = began.setdefault(step.description, (now, now))
        if step.finished:
            del began[step.description]
        elif step.done and now - told >= LINE_EVERY_S:
            began[step.description] = (start, now)
            of = "" if step.total is None else f" of {step.total}"
            left = (
                ""
                if step.total is None
                else f", about {(now - start) / step.done * (step.total - step.done):.0f} s left"
            )
            console.print(f"{step.description}: {step.done}{of}{left}", soft_wrap=True)

    return tell


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """What these loggers have to say short of errors is for developers of those libraries: leave it out for a while."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
