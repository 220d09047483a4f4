"""Other users than the one that runs the tests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

FIRST, SECOND, TEAM = 65534, 1, 4711  # nobody and daemon of every system, and a group of a test's own


@contextmanager
def as_user(user: int, *groups: int) -> Iterator[None]:
    """What is done within is done by another user, whose own group has the user's number; as root alone."""
    if os.geteuid():
        pytest.skip("only root can be two users")
    before = os.getgroups()
    os.setgroups([user, *groups])
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)
