"""Triton's figures over the last minutes: its Prometheus text, read every few seconds and turned into rates."""

import math
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lowpass.export.triton.address import Address
from lowpass.export.triton.state import UNANSWERED, VersionState, ask, failures, serving_versions, versions_in

EVERY_S, KEPT = 2.0, 151  # seconds between two looks; looks that are remembered: five minutes
RATE_S = 10.0  # what the present rate is an average of
DENSE = "-dense"  # ends the name that `lowpass deploy --with-dense` gives the dense model
COUNTERS = {
    "nv_inference_request_success": "requests",
    "nv_inference_count": "images",
    "nv_inference_exec_count": "batches",
    "nv_inference_queue_duration_us": "queue_us",
    "nv_inference_request_failure": "failures",
}
LATENCY, PENDING = "nv_inference_request_summary_us", "nv_inference_pending_request_count"
PERCENTILES = {"0.5": "p50_ms", "0.95": "p95_ms", "0.99": "p99_ms"}
SERIES = ("images_per_s", "p50_ms", "p95_ms", "p99_ms", "queue_ms", "pending")
LINE = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
ESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


@dataclass(frozen=True)
class Sample:
    """One line of Prometheus' text format."""

    name: str
    labels: Mapping[str, str]
    value: float


def parse(text: str) -> Iterator[Sample]:
    """The samples of a text; comments and lines that are none are passed over."""
    for line in text.splitlines():
        if line.startswith("#") or not (found := LINE.fullmatch(line.strip())):
            continue
        labels = {
            name: re.sub(r"\\.", lambda match: ESCAPED.get(match[0], match[0]), value)
            for name, value in LABEL.findall(found["labels"] or "")
        }
        try:
            yield Sample(found["name"], labels, float(found["value"]))
        except ValueError:
            continue


@dataclass(frozen=True)
class Moment:
    """What one look found. `totals` of a model: counted since the first look, whatever versions and servers came and
    went."""

    at: float
    totals: Mapping[str, Counter[str]] = field(default_factory=dict)
    gauges: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Figures:
    """Looks at a server every few seconds, in a thread of its own between `start` and `stop`."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._moments: deque[Moment | None] = deque(maxlen=KEPT)  # None: the server did not answer
        self._states: list[VersionState] | None = None
        self._failed: set[VersionState] = set()
        self._counted: dict[tuple[str, ...], float] = {}
        self._totals: dict[str, Counter[str]] = {}
        self._lock, self._over = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Look from now on."""
        self.look()
        threading.Thread(target=self._go_on, daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()

    def _go_on(self) -> None:
        while not self._over.wait(EVERY_S):
            self.look()

    def look(self) -> None:
        """Once, now."""
        states = versions_in(self.address)
        try:
            text = ask(self.address.metrics_url).decode(errors="replace")
        except UNANSWERED:
            text = None
        with self._lock:
            if text is None:
                self._states, self._counted = None, {}  # a server that comes anew counts anew
                self._moments.append(None)
                return
            self._states = states
            self._failed = failures(states or [], self._failed)
            self._moments.append(self.take(text, time.monotonic(), states or []))

    def take(self, text: str, at: float, states: Iterable[VersionState]) -> Moment:
        """What the server's text says at a time in seconds."""
        serving = serving_versions(states)
        gauges: dict[str, dict[str, float]] = {}
        counted: dict[tuple[str, ...], float] = {}
        for sample in parse(text):
            model, version = sample.labels.get("model", ""), sample.labels.get("version", "")
            if what := COUNTERS.get(sample.name):
                reason = sample.labels.get("reason", "")
                counted[model, version, "rejections" if reason == "REJECTED" else what, reason] = sample.value
            elif sample.name == PENDING:
                waiting = gauges.setdefault(model, {})
                waiting["pending"] = waiting.get("pending", 0) + sample.value
            elif sample.name == LATENCY and version == str(serving.get(model)):
                percentile = PERCENTILES.get(sample.labels.get("quantile", ""))
                if percentile and math.isfinite(sample.value):  # without requests it is not a number
                    gauges.setdefault(model, {})[percentile] = sample.value / 1000
        for key, value in counted.items():
            # A version that is new here has counted its warm-up, which nobody asked for.
            grown = value - self._counted.get(key, value)
            self._totals.setdefault(key[0], Counter())[key[2]] += int(grown) if grown > 0 else 0
        self._counted = counted
        return Moment(at, {model: Counter(sums) for model, sums in self._totals.items()}, gauges)

    def as_json(self) -> dict[str, Any]:
        """What the page shows: models, each with its dense one beside it."""
        with self._lock:
            moments, states, failed = list(self._moments), self._states, self._failed
            # Of a server that is down, what it served stays in sight.
            names = sorted(self._totals if states is None else {one.name for one in states})
        serving = serving_versions(states or [])

        def model(name: str) -> dict[str, Any]:
            reasons = sorted(f"version {one.version}: {one.reason}" for one in failed if one.name == name)
            return {"name": name, "version": serving.get(name), "failed": reasons} | _history(name, moments)

        return {
            "up": states is not None,
            "every_s": EVERY_S,
            "kept": KEPT - 1,
            "pairs": [[model(name) for name in pair] for pair in _pairs(names)],
        }


def _pairs(names: list[str]) -> list[list[str]]:
    """Every model with its dense one, if there is one; a dense one alone stands alone."""
    dense = {name + DENSE for name in names}.intersection(names)
    return [[name, *({name + DENSE} & dense)] for name in names if name not in dense]


def _history(name: str, moments: list[Moment | None]) -> dict[str, Any]:
    points = [_point(name, before, now) for before, now in pairwise(moments)]
    last = moments[-1] if moments else None
    return {
        "total": dict(last.totals.get(name, {})) if last else {},
        "now": _point(name, _long_enough_ago(moments), last),
        "series": {what: [point.get(what) for point in points] for what in SERIES},
    }


def _long_enough_ago(moments: list[Moment | None]) -> Moment | None:
    """The moment from which the present rate is reckoned: after the last silence, and not too long ago."""
    found = None
    for moment in reversed(moments):
        if moment is None or (found and moments[-1] and moments[-1].at - moment.at > RATE_S + EVERY_S / 2):
            break
        found = moment
    return found


def _point(name: str, before: Moment | None, now: Moment | None) -> dict[str, float]:
    """A model's figures between two moments; what is not known is not there."""
    if now is None:
        return {}
    point = dict(now.gauges.get(name, {}))
    if before is None or name not in before.totals or now.at <= before.at:
        return point
    grown = now.totals[name] - before.totals[name]
    for what in ("requests", "images", "failures", "rejections"):
        point[f"{what}_per_s"] = grown[what] / (now.at - before.at)
    if grown["requests"]:
        point["queue_ms"] = grown["queue_us"] / grown["requests"] / 1000
    if grown["batches"]:
        point["mean_batch"] = grown["images"] / grown["batches"]
    return point
