"""A connection to a served model: prepared images in, logits or classes out. Also the example of a client to write
one's own by; `predict.py` prepares the images."""

import json
import math
import re
import threading
import time
import traceback
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal

import numpy as np
import tritonclient.grpc
import tritonclient.http
from google.protobuf import json_format
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.model.architecture import Preprocessing

Protocol = Literal["http", "grpc"]
TIMEOUT_S = 60.0
CANARY_SHARE = "canary_share"  # parameter of a canary's configuration
PAUSES_S = (0.1, 0.3, 1.0, 3.0, 6.0)  # between the tries at a server that is overloaded
# As Triton says that a queue is full or a request waited too long in it, and that a version gives way to another.
FULL = re.compile(r"maximum queue size|timeout expired", re.IGNORECASE)
REFUSED = re.compile(r"expects", re.IGNORECASE)  # another shape or type than it was given
CHANGING = re.compile(r"not at ready state", re.IGNORECASE)


@dataclass(frozen=True)
class Guess:
    """One class of an image: its number, its label, and its probability or logit."""

    index: int
    label: str
    score: float


@dataclass(frozen=True)
class Served:
    """What the server says of a model: how to prepare an image, the largest batch, how many classes there are, and of a
    canary the percentage of requests it is to get."""

    name: str
    max_batch: int
    size: tuple[int, int, int]  # channels, height, width
    classes: int
    uint8: bool
    preprocessing: Preprocessing
    canary_share: float | None = None


class Client:
    """One model behind a URL `HOST:PORT`, over HTTP or gRPC. Threads may share it: each has its own connection."""

    def __init__(self, url: str, model: str, protocol: Protocol = "http", timeout_s: float = TIMEOUT_S) -> None:
        """Connect and ask what the model takes. `timeout_s` is for one request, with all tries of it.

        Raises:
            InputError: no such address can be, the model is not there, or it was not deployed by lowpass.
            RunError: nobody answers, or not in this protocol.
        """
        if not re.fullmatch(r"[\w.-]+", model):
            raise InputError(f"--model {model!r} is no name of a model")
        self.url, self.model, self.protocol, self.timeout_s = url, model, protocol, timeout_s
        self.library: Any = tritonclient.http if protocol == "http" else tritonclient.grpc
        self._address = _address(url)
        self._own = threading.local()
        self.version, self.served = self._look()

    def _look(self) -> tuple[int, Served]:
        """Which version is served, and what it takes."""
        remedy = "is `lowpass serve` running, and this its port? (HTTP 8000 and gRPC 8001 unless told otherwise)"
        try:
            answer = self.client.get_model_config(self.model)
        except InferenceServerException as error:
            if "unknown model" in str(error) or "not ready" in str(error):
                raise InputError(f"{self.url} does not serve {self.model}: {error.message()}; see --model") from None
            raise RunError(f"{self.url} does not answer: {error.message()}; {remedy}") from None
        except (OSError, HTTPException, ValueError) as error:  # no connection; an answer in another protocol
            raise RunError(f"{self.url} does not answer ({error}); {remedy}") from None
        http = self.protocol == "http"
        config = answer if http else json_format.MessageToDict(answer, preserving_proto_field_name=True)
        return _served(self.model, config.get("config", config))

    @property
    def client(self) -> Any:
        """This thread's connection, of tritonclient. It hangs up when the thread ends."""
        if not hasattr(self._own, "connection"):
            timeouts = {"connection_timeout": self.timeout_s, "network_timeout": self.timeout_s}
            self._own.connection = self.library.InferenceServerClient(
                self._address, **(timeouts if self.protocol == "http" else {})
            )
        return self._own.connection

    def logits(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Prepared images [B, ...] as the model takes them -> [B, classes] FP32.

        Raises:
            RunError: the server refuses, is overloaded, or does not answer in time.
        """
        result: NDArray[np.float32] = self._ask(images, None)
        return result

    def classify(
        self, images: NDArray[Any], top: int, logits: bool = False, names: Sequence[object] | None = None
    ) -> list[list[Guess]]:
        """The `top` classes of each prepared image, best first.

        Labels and scores come in one answer, of Triton's classification of all classes: both are of one version, even
        while another takes its place.

        Args:
            images: [B, ...] as the model takes them.
            top: classes of each.
            logits: scores are logits instead of probabilities.
            names: of the images, for messages.

        Raises:
            RunError: the server refuses, is overloaded, does not answer in time, or a logit is not finite.
        """
        guesses = []
        for row, name in zip(self._ask(images, self.served.classes), names or range(len(images)), strict=True):
            scores = np.array([float(entry.split(b":", 1)[0]) for entry in row])
            if not np.isfinite(scores).all():
                raise RunError(f"{self.url}: {self.model} answers with logits that are not finite, for {name}")
            if not logits:
                scores = np.exp(scores - scores.max())
                scores /= scores.sum()
            fields = [entry.decode(errors="backslashreplace").split(":", 2) for entry in row[:top]]
            if any(len(field) != 3 for field in fields):
                raise RunError(
                    f"{self.url}: {self.model} answers without labels; its labels.txt is damaged: `lowpass deploy "
                    "--rollback`, or deploy it again"
                )
            guesses.append(
                [Guess(int(field[1]), field[2], float(score)) for field, score in zip(fields, scores, strict=False)]
            )
        return guesses

    def _ask(self, images: NDArray[Any], classes: int | None) -> NDArray[Any]:
        given = self.library.InferInput("images", list(images.shape), "UINT8" if self.served.uint8 else "FP32")
        given.set_data_from_numpy(images)
        wanted = self.library.InferRequestedOutput("logits", **({} if classes is None else {"class_count": classes}))
        until = time.monotonic() + self.timeout_s
        for pause in (*PAUSES_S, math.inf):
            limit = {} if self.protocol == "http" else {"client_timeout": until - time.monotonic()}
            try:
                answer = self.client.infer(self.model, [given], outputs=[wanted], **limit)
                self._check_version(answer.get_response())
                result: NDArray[Any] = answer.as_numpy("logits")
                return result
            except (InferenceServerException, OSError, HTTPException) as error:
                # An error holds the frames it passed, and so the connection, which another thread would then close in
                # the end. gevent forbids that.
                traceback.clear_frames(error.__traceback__)
                if not _may_pass(error) or time.monotonic() + pause > until:
                    if isinstance(error, InferenceServerException) and REFUSED.search(error.message()):
                        self._check_version(None)
                    raise RunError(self._why(error)) from None
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _check_version(self, answer: Any) -> None:
        """That another version, which took the place of the one that was asked for its needs, has the same. `answer`
        is None where it refused to give any."""
        if answer is not None and self.version == int(
            answer["model_version"] if self.protocol == "http" else answer.model_version
        ):
            return
        now, served = self._look()
        if _needs(served) != _needs(self.served):
            raise RunError(
                f"{self.url}: version {now} of {self.model} took the place of version {self.version} meanwhile, "
                "and takes other images or has other classes; what it says to images that were prepared for the other "
                "is of no use: ask again"
            )
        self.version, self.served = now, served

    def _why(self, error: Exception) -> str:
        if isinstance(error, TimeoutError) or _status(error) == "StatusCode.DEADLINE_EXCEEDED":
            return f"{self.url} did not answer within {self.timeout_s:g} s"
        if not isinstance(error, InferenceServerException):
            return f"{self.url} went away: {error}"
        if _may_pass(error) and FULL.search(error.message()):
            remedy = "ask again later, or give the model more --instances"
            return f"{self.url} is overloaded with requests for {self.model}: {error.message()}; {remedy}"
        if _may_pass(error):
            return f"{self.url} does not serve {self.model} at the moment: {error.message()}"
        if _status(error) == "StatusCode.UNAVAILABLE":
            return f"{self.url} went away: {error.message()}"
        return f"{self.url} refused the request: {error.message()}"

    def close(self) -> None:
        """Hang up, in this thread."""
        self.client.close()


def _status(error: Exception) -> str | None:
    return error.status() if isinstance(error, InferenceServerException) else None


def _may_pass(error: Exception) -> bool:
    """Whether asking again may help: somebody is there, but not now."""
    if _status(error) == "StatusCode.UNAVAILABLE":  # of gRPC, which says so of no connection as well
        return bool(FULL.search(str(error)) or CHANGING.search(str(error)))
    return _status(error) == "503"


def _address(url: str) -> str:
    """HOST:PORT of a URL, with or without a scheme."""
    try:
        parts = urllib.parse.urlsplit("//" + url.split("://", 1)[-1])
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None:
        raise InputError(f"--url {url!r} is not HOST:PORT, such as 127.0.0.1:8000")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _needs(served: Served) -> tuple[object, ...]:
    """What a client must have done right for an answer to mean anything."""
    return served.size, served.uint8, served.preprocessing, served.classes


def _served(model: str, config: dict[str, Any]) -> tuple[int, Served]:
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    try:
        channels, height, width = json.loads(parameters["input_size"])
        (version,) = config["version_policy"]["specific"]["versions"]
        if [one["name"] for one in config["output"]] != ["logits"]:
            raise LookupError
        served = Served(
            name=model,
            max_batch=int(config.get("max_batch_size", 0)),
            size=(channels, height, width),
            classes=int(config["output"][0]["dims"][0]),
            uint8=parameters["input"] == "uint8",
            preprocessing=Preprocessing.model_validate_json(parameters["preprocessing"]),
            canary_share=float(parameters[CANARY_SHARE]) if CANARY_SHARE in parameters else None,
        )
        return int(version), served
    except (LookupError, ValueError):
        raise InputError(
            f"{model} cannot be asked by `predict`: it was not deployed by `lowpass deploy`, or stands around a model "
            "that was; its configuration does not say what a client must know"
        ) from None
