"""Real images to a served model, and labels with scores back. Also the example of a client to write one's own by."""

import json
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tritonclient.grpc
import tritonclient.http
from google.protobuf import json_format
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_transform
from tritonclient.utils import InferenceServerException

from lowpass.export.graph.pixels import to_pixels
from lowpass.pipeline.base.errors import InputError, RunError
from lowpass.pipeline.data.datasets import MODES
from lowpass.pipeline.data.pictures import UNREADABLE, as_mode
from lowpass.pipeline.model.architecture import Preprocessing

Protocol = Literal["http", "grpc"]
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Guess:
    """One class of an image: its number, its label and its logit."""

    index: int
    label: str
    score: float


@dataclass(frozen=True)
class Served:
    """What the server says of a model: how to prepare an image, and the largest batch."""

    name: str
    max_batch: int
    size: tuple[int, int, int]  # channels, height, width
    uint8: bool
    preprocessing: Preprocessing


class Client:
    """One model behind a URL `HOST:PORT`, over HTTP or gRPC."""

    def __init__(self, url: str, model: str, protocol: Protocol = "http") -> None:
        """Connect and ask what the model takes.

        Raises:
            InputError: no such address can be, the model is not there, or it was not deployed by lowpass.
            RunError: nobody answers, or not in this protocol.
        """
        address = _address(url)
        self.library: Any = tritonclient.http if protocol == "http" else tritonclient.grpc
        timeouts = {"connection_timeout": TIMEOUT_S, "network_timeout": TIMEOUT_S} if protocol == "http" else {}
        self.url, self.model = url, model
        remedy = "is `lowpass serve` running, and this its port? (HTTP 8000 and gRPC 8001 unless told otherwise)"
        try:
            self.client = self.library.InferenceServerClient(address, **timeouts)
            answer = self.client.get_model_config(model)
        except InferenceServerException as error:
            if "unknown model" in str(error) or "not ready" in str(error):
                raise InputError(f"{url} does not serve {model}: {error.message()}; see --model") from None
            raise RunError(f"{url} does not answer: {error.message()}; {remedy}") from None
        except (OSError, HTTPException) as error:  # no connection; an answer in another protocol
            raise RunError(f"{url} does not answer ({error}); {remedy}") from None
        config = answer if protocol == "http" else json_format.MessageToDict(answer, preserving_proto_field_name=True)
        self.served = _served(model, config.get("config", config))

    def logits(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Prepared images [B, ...] as the model takes them -> [B, classes] FP32.

        Raises:
            RunError: the server refuses.
        """
        result: NDArray[np.float32] = self._ask(images, None)
        return result

    def classify(self, images: NDArray[Any], top: int) -> list[list[Guess]]:
        """The `top` classes of each prepared image, best first, by the server's own classification.

        Raises:
            RunError: the server refuses.
        """
        guesses = []
        for row in self._ask(images, top):
            fields = [entry.decode().split(":", 2) for entry in row]
            guesses.append([Guess(int(index), label, float(score)) for score, index, label in fields])
        return guesses

    def _ask(self, images: NDArray[Any], top: int | None) -> NDArray[Any]:
        given = self.library.InferInput("images", list(images.shape), "UINT8" if self.served.uint8 else "FP32")
        given.set_data_from_numpy(images)
        wanted = self.library.InferRequestedOutput("logits", **({} if top is None else {"class_count": top}))
        try:
            answer = self.client.infer(self.model, [given], outputs=[wanted])
        except InferenceServerException as error:
            raise RunError(f"{self.url} refused the request: {error.message()}") from None
        except (OSError, HTTPException) as error:
            raise RunError(f"{self.url} went away: {error}") from None
        result: NDArray[Any] = answer.as_numpy("logits")
        return result

    def close(self) -> None:
        """Hang up."""
        self.client.close()


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


def predict(client: Client, files: Sequence[Path], top: int) -> dict[Path, list[Guess]]:
    """Image files in batches -> their best classes.

    Raises:
        InputError: a file is no image; nothing was sent.
        RunError: the server refused.
    """
    images = prepare(client.served, files)
    step = max(1, client.served.max_batch)
    parts = [client.classify(images[start : start + step], top) for start in range(0, len(files), step)]
    return dict(zip(files, (guesses for part in parts for guesses in part), strict=True))


def prepare(served: Served, files: Sequence[Path]) -> NDArray[Any]:
    """Image files as the model takes them: [B, C, H, W] FP32 normalised, or pixels [B, H, W, C] uint8.

    Raises:
        InputError: one is missing or no image.
    """
    prep = served.preprocessing
    transform = create_transform(
        input_size=served.size,
        mean=prep.mean,
        std=prep.std,
        interpolation=prep.interpolation,
        crop_pct=prep.crop_pct,
        crop_mode=prep.crop_mode,
    )
    prepared = []
    for file in files:
        try:
            with Image.open(file) as image:
                prepared.append(transform(as_mode(image, MODES[served.size[0]])).numpy())
        except UNREADABLE as error:
            raise InputError(f"{file} cannot be read as an image: {error}") from None
    images = np.stack(prepared).astype(np.float32, copy=False)
    return to_pixels(images, prep) if served.uint8 else images


def _served(model: str, config: dict[str, Any]) -> Served:
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    try:
        channels, height, width = json.loads(parameters["input_size"])
        return Served(
            name=model,
            max_batch=int(config.get("max_batch_size", 0)),
            size=(channels, height, width),
            uint8=parameters["input"] == "uint8",
            preprocessing=Preprocessing.model_validate_json(parameters["preprocessing"]),
        )
    except (KeyError, ValueError):
        raise InputError(f"{model} was not deployed by `lowpass deploy`: it does not say its preprocessing") from None
