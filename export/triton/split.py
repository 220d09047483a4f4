"""Requests to a model of which a share goes to its canary, and how the two compare."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

from numpy.typing import NDArray

from lowpass.export.triton.client import Client, Guess
from lowpass.export.triton.repository import canary_name
from lowpass.pipeline.base.errors import InputError, RunError


@dataclass(frozen=True)
class Comparison:
    """What both versions said to the same images. `agreement` in percent of them, the same top-1; milliseconds are
    medians of a request; `failures` are requests that the canary alone did not answer. None: nothing was tried."""

    version: int
    share: float
    requests: int
    images: int
    agreement: float | None
    stable_ms: float | None
    canary_ms: float | None
    failures: int


class Split:
    """Answers as a `Client` of a model does, a share of them from its canary. What the canary is asked, the model is
    asked as well: so both can be compared, and a canary that fails is not noticed by who waits for an answer."""

    def __init__(self, stable: Client, canary: Client) -> None:
        """Of two models that take the same images; the canary's configuration says the share."""
        self.stable, self.canary = stable, canary
        self.served = stable.served
        self.share = canary.served.canary_share or 0.0
        self._lock = threading.Lock()
        self._owed = 0.0  # of the canary's share, in requests
        self._requests = self._images = self._same = self._failures = 0
        self._stable_s, self._canary_s = list[float](), list[float]()

    @classmethod
    def find(cls, stable: Client) -> "Self | None":
        """With the canary of a model, if it has one.

        Raises:
            RunError: the server does not answer.
        """
        try:
            canary = Client(stable.url, canary_name(stable.model), stable.protocol, stable.timeout_s)
        except InputError:
            return None
        return cls(stable, canary) if canary.served.canary_share is not None else None

    def classify(
        self, images: NDArray[Any], top: int, logits: bool = False, names: Sequence[object] | None = None
    ) -> list[list[Guess]]:
        """See `Client.classify`.

        Raises:
            RunError: the model that serves does not answer; of the canary, that is only counted.
        """
        with self._lock:
            self._owed += self.share / 100
            tried = self._owed >= 1
            self._owed -= tried
        began = time.perf_counter()
        guesses = self.stable.classify(images, top, logits, names)
        between = time.perf_counter()
        if not tried:
            return guesses
        try:
            new = self.canary.classify(images, top, logits, names)
        except RunError:
            with self._lock:
                self._failures += 1
            return guesses
        ended = time.perf_counter()
        with self._lock:
            self._requests += 1
            self._images += len(images)
            self._same += sum(one[0].index == other[0].index for one, other in zip(guesses, new, strict=True))
            self._stable_s.append(between - began)
            self._canary_s.append(ended - between)
        return new

    def comparison(self) -> Comparison:
        """So far."""
        with self._lock:
            compared = self._requests > 0
            return Comparison(
                version=self.canary.version,
                share=self.share,
                requests=self._requests,
                images=self._images,
                agreement=100 * self._same / self._images if compared else None,
                stable_ms=1000 * median(self._stable_s) if compared else None,
                canary_ms=1000 * median(self._canary_s) if compared else None,
                failures=self._failures,
            )
