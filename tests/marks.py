"""Tests of which a few cases are enough for `make test`; the others are for `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def few(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """The cases of a parametrised test, of which all but `fast` are slow."""
    every = list(cases)
    assert fast and set(fast) <= set(every), f"{fast} are not all among {every}"
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in every]
