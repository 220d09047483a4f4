"""What a running server says of itself and its models, and what of it an operator wants to hear."""

import json
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from lowpass.export.triton.address import Address

PATIENCE_S = 2.0
UNANSWERED = (OSError, HTTPException, ValueError)  # nobody listens, or what listens does not speak as Triton does
# A proxy in the environment is for the world outside, not for a server on this machine.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
LOADING, UNLOADING, READY, UNAVAILABLE = "LOADING", "UNLOADING", "READY", "UNAVAILABLE"
TAKEN_AWAY = "unloaded"  # the reason of a version that was served and no longer is to be


@dataclass(frozen=True)
class VersionState:
    """A version of a model; `reason` is the first line of why it is not ready."""

    name: str
    version: int
    state: str
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether the server gave up loading it."""
        return self.state == UNAVAILABLE and self.reason != TAKEN_AWAY


def versions_in(address: Address) -> list[VersionState] | None:
    """Every version that the server knows; None: it cannot be asked. A folder that is no model, such as the lost+found
    of a disk, has no state and is left out."""
    try:
        index = json.loads(ask(f"{address.url}/v2/repository/index", b"{}"))
    except UNANSWERED:
        return None
    return [
        VersionState(
            model["name"],
            int(model.get("version") or 0),
            model["state"],
            next(iter(str(model.get("reason", "")).splitlines()), ""),
        )
        for model in index
        if model.get("state")
    ]


def is_ready(address: Address, identity: str | None = None) -> bool:
    """Whether every model can be asked: each has a version that serves.

    Triton's own strict readiness stays false for good once any version failed to load, also when a later one serves. A
    version that is being loaded beside one that serves does not count: one that fails is tried again at every poll.

    Args:
        address: of the server.
        identity: what it was told to call itself; None: any will do.
    """
    try:
        ask(f"{address.url}/v2/health/ready")
        about: dict[str, Any] = json.loads(ask(f"{address.url}/v2"))
    except UNANSWERED:
        return False
    states = versions_in(address)
    if states is None or (identity is not None and about.get("name") != identity):
        return False
    wanted = {one.name for one in states if one.reason != TAKEN_AWAY}
    return wanted <= serving_versions(states).keys()


def broken_models(address: Address) -> dict[str, str]:
    """The models of which no version serves, and why; without those that are being loaded."""
    failed: dict[str, str] = {}
    alive = set()
    for one in sorted(versions_in(address) or [], key=lambda one: one.version):
        if one.failed:
            failed[one.name] = one.reason or "no reason given"
        elif one.state != UNAVAILABLE:
            alive.add(one.name)
    return {name: reason for name, reason in failed.items() if name not in alive}


class News:
    """Tells each change once. What serves at the beginning is no news; what does not load is."""

    def __init__(self) -> None:
        self._serving: dict[str, int] | None = None
        self._failed: set[VersionState] = set()

    def of(self, states: Iterable[VersionState]) -> list[str]:
        """What has changed since the last call, a sentence each."""
        states = list(states)
        serving = serving_versions(states)
        before = self._serving
        told = []
        if before is not None:
            told += [f"{name} serves version {v}" for name, v in serving.items() if before.get(name) != v]
            busy = {one.name for one in states if one.state in (LOADING, UNLOADING)}
            gone = {name: v for name, v in before.items() if name not in serving}
            told += [f"{name} is served no longer" for name in gone if name not in busy]
            serving |= {name: v for name, v in gone.items() if name in busy}
        failed = failures(states, self._failed)
        for one in sorted(failed - self._failed, key=lambda one: (one.name, one.version)):
            rest = f"version {serving[one.name]} serves on" if one.name in serving else "no other version serves"
            told.append(f"version {one.version} of {one.name} does not load: {one.reason}; {rest}")
        self._failed = failed
        self._serving = serving
        return told


def failures(states: Iterable[VersionState], before: Iterable[VersionState]) -> set[VersionState]:
    """The versions that do not load. One that failed before and is being tried again is one of them still."""
    states = list(states)
    retried = {(one.name, one.version) for one in states if one.state == LOADING}
    return {one for one in states if one.failed} | {one for one in before if (one.name, one.version) in retried}


def serving_versions(states: Iterable[VersionState]) -> dict[str, int]:
    """Of each model the newest version that answers."""
    serving: dict[str, int] = {}
    for one in states:
        if one.state == READY:
            serving[one.name] = max(one.version, serving.get(one.name, 0))
    return serving


def ask(url: str, body: bytes | None = None) -> bytes:
    """What the server answers; POST if there is a body.

    Raises:
        OSError, HTTPException: it does not, or refuses.
    """
    request = urllib.request.Request(url, data=body)  # noqa: S310 - the server's own address
    with _DIRECT.open(request, timeout=PATIENCE_S) as answer:
        content: bytes = answer.read()
    return content
