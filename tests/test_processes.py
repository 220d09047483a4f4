"""Several processes share batches and sums, and notice when they do not find the same."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st
from ranks import command, together

from lowpass.pipeline.base.errors import ElsewhereError, InputError, RunError
from lowpass.pipeline.base.launched import is_first, rank
from lowpass.pipeline.base.processes import (
    Share,
    agreed,
    by_the_first,
    in_order,
    same_everywhere,
    share,
    sum_over_processes,
    sums_over_processes,
)


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 5), st.integers(0, 60))
def test_shares_are_all_there_is(lengths: list[int], count: int, images: int) -> None:
    """Each batch whole, once, with its place among the images, whoever has it."""
    shares = [Share(tuple(lengths), first, count) for first in range(count)]
    numbers = [own.of(range(len(lengths))) for own in shares]
    assert sorted(number for own in numbers for number in own) == list(range(len(lengths)))
    first = 0
    while sum(lengths[:first]) < images and first < len(lengths):
        first += 1
    for own, its in zip(shares, numbers, strict=True):
        assert own.starts == [sum(lengths[:number]) for number in its]
        assert its[: own.among_first(images)] == [number for number in its if number < first]


def test_one_process_is_let_through() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    assert sums_over_processes((one, two)) == [one, two] and sums_over_processes(None) is None
    assert list(in_order(iter([3, 1, 2]), 3)) == [3, 1, 2]
    assert share([4, 4]) == Share((4, 4), 0, 1)
    assert agreed(lambda: 5) == by_the_first(lambda: 5) == 5


def sums() -> list[Any]:
    number = rank()
    some = (torch.full((2, 2), 10.0**number, dtype=torch.float64), torch.tensor(number + 1))
    everybody = sums_over_processes(some)
    the_second = sums_over_processes(some if number == 1 else None)
    return [everybody, the_second, sums_over_processes(None), float(sum_over_processes(torch.tensor(0.5)))]


def test_sums_are_of_all() -> None:
    """Of a process without images as well."""
    for everybody, the_second, nobody, half in together(sums, count=3):
        assert torch.equal(everybody[0], torch.full((2, 2), 111.0, dtype=torch.float64)) and int(everybody[1]) == 6
        assert torch.equal(the_second[0], torch.full((2, 2), 10.0, dtype=torch.float64)) and int(the_second[1]) == 2
        assert nobody is None and half == 1.5


def counted() -> tuple[list[int], list[int]]:
    made = list[int]()

    def counts() -> Iterator[int]:
        for number in share([1] * 7).of(range(7)):
            made.append(number)
            yield 10 * number

    found, total = list[int](), 0
    for count in in_order(counts(), 7):
        found.append(count)
        total += count
        if total >= 60:  # reached with number 3
            break
    return found, made


def test_counts_come_in_order_and_no_further_than_is_looked() -> None:
    (first, its), (second, other) = together(counted)
    assert first == second == [0, 10, 20, 30]
    assert (its, other) == ([0, 2], [1, 3])


def failures() -> list[tuple[str, str]]:
    def said(work: Any) -> tuple[str, str]:
        try:
            work()
        except Exception as error:
            return type(error).__name__, str(error)
        return "", ""

    def refuse() -> int:
        if rank():
            raise InputError("no such file")
        return 1

    def only_here() -> int:
        assert is_first()
        raise RunError("it does not build")

    return [
        said(lambda: same_everywhere("the plan", "a")),
        said(lambda: same_everywhere("the plan", f"a{rank()}")),
        said(lambda: same_everywhere("block 0", {"weight": torch.tensor([1.0 + 1e-7 * rank()])})),
        said(lambda: sums_over_processes([torch.zeros(2 + rank())])),
        said(lambda: agreed(refuse)),
        said(lambda: by_the_first(only_here)),
        said(lambda: by_the_first(lambda: 1) if rank() else same_everywhere("the plan", "a")),
    ]


def test_what_goes_wrong_goes_wrong_in_all() -> None:
    first, second = together(failures)
    both = list(zip(first, second, strict=True))
    assert both[0] == (("", ""), ("", ""))
    for one, other in both[1:3]:
        assert one == other and one[0] == "RunError"
    assert first[1][1].startswith("the plan is not the same in all processes (0: ")
    assert first[2][1].startswith("block 0 is not the same in all processes")
    assert first[3] == second[3] and "do not sum the same" in first[3][1]
    assert (first[4], second[4]) == (("ElsewhereError", "process 1: no such file"), ("InputError", "no such file"))
    assert (first[5], second[5]) == (
        ("RunError", "it does not build"),
        ("ElsewhereError", "process 0: it does not build"),
    )
    assert first[6] == second[6] == ("RunError", first[6][1])
    assert "do not do the same: they are at the plan, what the first makes" in first[6][1]


def left_alone() -> str:
    sum_over_processes(torch.zeros(1))
    if rank():
        os._exit(0)
    try:
        sum_over_processes(torch.zeros(1))
    except RunError as error:
        return str(error)
    return "nothing"


def test_one_that_ends_is_missed() -> None:
    said, nothing = together(left_alone)
    assert nothing is None and said.startswith("the processes have lost each other")


def refused(*arguments: str) -> tuple[tuple[int, str, str], float]:
    began = time.monotonic()
    return command(*arguments), time.monotonic() - began


@pytest.mark.slow
def test_the_first_alone_says_why() -> None:
    """The others wait until it has: a launcher ends all of them with the first that goes."""
    compress = "compress --model digits_deit --data digits"
    for arguments, said in (
        ("export nowhere", "2 processes were started, each of which would do all of `lowpass export`: start one"),
        (f"{compress} --ship", "--ship takes one process"),
        (f"{compress} --target-macs 2", "target_macs"),
        (f"{compress} --target-latency 1 --runtime openvino", "--runtime openvino is measured on this machine"),
    ):
        ((code, out, err), _), (other, seconds) = together(refused, *arguments.split())
        assert code == 2 and not out and err.count("lowpass: ") == len(err.splitlines()) == 1 and said in err
        assert other == (2, "", "") and seconds > 1


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would say no more than that its use is invalid."""
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 processes were started on this machine, which has 1 GPUs: start one for"):
        sum_over_processes(torch.zeros(1))


def test_processes_that_do_not_find_each_other_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a cluster sets WORLD_SIZE, and nobody has launched anything."""
    for name in ("MASTER_ADDR", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(os, "environ", os.environ.copy())  # to which accelerate adds
    with pytest.raises(RunError, match="WORLD_SIZE says that 2 processes were started, but they do not find each"):
        sum_over_processes(torch.zeros(1))


def test_that_another_failed_is_a_failure() -> None:
    assert issubclass(ElsewhereError, RunError) and ElsewhereError("process 1: no", 2).code == 2
