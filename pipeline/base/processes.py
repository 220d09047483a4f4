"""The processes that search or train together, as `torchrun` and `accelerate launch` start them.

Batches are shared whole (`share`), what is summed over images is summed over the processes (`sum_over_processes`), and
what is decided hangs on such sums alone, so that each process decides the same: `same_everywhere` sees to it. What can
be had once only is made `by_the_first`. To a process that is alone all of it does nothing.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from lowpass.pipeline.base.errors import ElsewhereError, InputError, RunError
from lowpass.pipeline.base.launched import is_first, rank, started_together

T = TypeVar("T")
WAIT = timedelta(hours=2)  # at most for another process: what is made by the first alone may take long


def on_cpus() -> bool:
    """Whether several processes share the CPUs. accelerate must be told: without a GPU it would take each to be alone,
    and each would do everything."""
    return started_together() > 1 and not torch.cuda.is_available()


def processes() -> PartialState:
    """This process among them.

    Raises:
        InputError: there are more of them on this machine than GPUs.
        RunError: they do not find each other.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if started_together() > 1 else 1
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise InputError(
            f"{here} processes were started on this machine, which has {torch.cuda.device_count()} GPUs: start one for "
            "each, or set CUDA_VISIBLE_DEVICES= to use CPUs"
        )
    try:
        state = PartialState(cpu=on_cpus(), timeout=WAIT)
    except (ValueError, RuntimeError) as error:
        raise RunError(
            f"WORLD_SIZE says that {started_together()} processes were started, but they do not find each other "
            f"({_first_line(error)}): start them by torchrun or accelerate launch, or one without WORLD_SIZE"
        ) from error
    if state.num_processes != started_together():
        raise RunError(f"{started_together()} processes were started, but {state.num_processes} work together")
    return state


@dataclass(frozen=True)
class Share:
    """Which of some batches are this process's: every `step`-th, from number `first` on. A batch stays whole, so that
    what is computed of it does not hang on how many processes there are. `lengths`: images of all batches."""

    lengths: tuple[int, ...]
    first: int = 0
    step: int = 1

    def of(self, items: Sequence[T]) -> list[T]:
        """Its own of what there is one of for each batch."""
        return list(items[self.first :: self.step])

    @property
    def starts(self) -> list[int]:
        """How many images come before each of its batches."""
        return self.of([0, *accumulate(self.lengths)][:-1])

    def among_first(self, images: int) -> int:
        """How many of its batches are among the fewest first ones that hold so many images."""
        return sum(start < images for start in self.starts)


def share(lengths: Iterable[int]) -> Share:
    """This process's share of batches of so many images each."""
    return Share(tuple(lengths), rank(), started_together())


def sum_over_processes(own: Tensor) -> Tensor:
    """See `sums_over_processes`, of a tensor that every process has."""
    sums = sums_over_processes((own,))
    assert sums is not None
    return sums[0]


def sums_over_processes(own: Sequence[Tensor] | None) -> list[Tensor] | None:
    """Tensors summed over all processes, the same bits in each: `AddUp` of `method/recovery.py`.

    Args:
        own: this process's, as many and of the same shapes in each; None: it has no images.

    Returns:
        As many; None where no process has images.

    Raises:
        RunError: they are of other shapes elsewhere, or a process has ended.
    """
    if started_together() == 1:
        return None if own is None else list(own)
    described = None if own is None else [(tuple(one.shape), one.dtype, one.device.type) for one in own]
    found = [other for other in _told_by_all("a sum", described) if other is not None]
    if not found:
        return None
    if any(other != found[0] for other in found):
        raise RunError(f"the processes do not sum the same: tensors of {found}")
    with _finding_each_other() as state:
        if own is None:
            own = [torch.zeros(shape, dtype=dtype, device=kind) for shape, dtype, kind in found[0]]
        return [reduce(one.to(state.device), "sum").to(one.device) for one in own]


def in_order(counts: Iterable[int], items: int) -> Iterator[int]:
    """A count of each of so many items, in their order.

    Args:
        counts: of the items that are this process's, as `share` says; each is made when it is its turn.
        items: of all processes.
    """
    own, together = iter(counts), started_together()
    for start in range(0, items, together):
        row = torch.zeros(together, dtype=torch.int64)
        if start + rank() < items:
            row[rank()] = next(own)
        yield from sum_over_processes(row)[: items - start].tolist()


def same_everywhere(what: str, value: str | Mapping[str, Tensor]) -> None:
    """Make sure that something is the same to the bit in all processes.

    Raises:
        RunError: it is not; the message begins with `what`.
    """
    if started_together() == 1:
        return
    digests = _told_by_all(what, _digest(value))
    if len(set(digests)) > 1:
        told = ", ".join(f"{number}: {digest[:8]}" for number, digest in enumerate(digests))
        raise RunError(
            f"{what} is not the same in all processes ({told}): give all of them the same command and files, "
            "on machines that are alike; a search goes on with --resume, with any number of them"
        )


def agreed(make: Callable[[], T]) -> T:
    """What each process makes for itself, without the others. Where one cannot, none goes on, and one says why.

    Raises:
        ElsewhereError: another process says why.
    """
    if started_together() == 1:
        return make()
    made, failed = list[T](), None
    try:
        made.append(make())
    except Exception as error:
        failed = error
    reasons = _told_by_all("what each makes", _reason(failed))
    for number, reason in enumerate(reasons):
        if reason is not None:
            _raise(failed if number == rank() else None, number, reason)
    return made[0]


def by_the_first(make: Callable[[], T]) -> T:
    """What the first process makes alone, in all of them. It must be something that can be pickled.

    Raises:
        ElsewhereError: the first process fails, and says why.
    """
    if started_together() == 1:
        return make()
    made, failed = list[T](), None
    if is_first():
        try:
            made.append(make())
        except Exception as error:
            failed = error
    made, reason = _told_by_all("what the first makes", (made, _reason(failed)))[0]
    if reason is not None:
        _raise(failed, 0, reason)
    return made[0]


def _reason(error: Exception | None) -> tuple[str, int] | None:
    """Why a process fails, and the exit code for it."""
    return None if error is None else (str(error), 2 if isinstance(error, InputError) else 1)


def _raise(own: Exception | None, number: int, reason: tuple[str, int]) -> None:
    message, code = reason
    raise own or ElsewhereError(f"process {number}: {message}", code)


def _told_by_all(what: str, own: Any) -> list[Any]:
    """What each process has to tell at this point of the work, in their order.

    Raises:
        RunError: another process is at another point, or has ended.
    """
    with _finding_each_other():
        told = gather_object([(what, own)])
    points = [point for point, _ in told]
    if len(set(points)) > 1:
        raise RunError(f"the processes do not do the same: they are at {', '.join(points)}")
    return [value for _, value in told]


@contextmanager
def _finding_each_other() -> Iterator[PartialState]:
    try:
        yield processes()
    except RunError:
        raise
    except RuntimeError as error:
        raise RunError(
            f"the processes have lost each other, as where one has ended ({_first_line(error)}); --resume goes on with "
            "a search"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _digest(value: str | Mapping[str, Tensor]) -> str:
    """SHA-256 of a text, or of names and tensors."""
    if isinstance(value, str):
        return hashlib.sha256(value.encode()).hexdigest()
    sum_ = hashlib.sha256()
    for name, tensor in value.items():
        sum_.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sum_.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sum_.hexdigest()
