"""Triton's Python backend: encoded pictures to what a vision transformer takes, as timm prepares them. Copied into the
model repository as it is, so it imports nothing of the package. Its settings are the `parameters` of config.pbtxt."""

import json
import math
from io import BytesIO
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

KINDS = ("JPEG", "PNG", "WEBP")
MOST_RESIZED = 50_000_000  # pixels; a picture of one row, made 256 high, would have more
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's name


class RefusedError(Exception):
    """A picture that is not taken, and why."""


class TritonPythonModel:
    """`picture` [B, 1] BYTES -> `images` [B, C, H, W] FP32, or pixels [B, H, W, C] UINT8."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the settings; what is raised here is why the server does not load the version."""
        Image.MAX_IMAGE_PIXELS = None  # the limit is this model's own, see `Preparation.decode`
        parameters = json.loads(args["model_config"])["parameters"]
        self.preparation = Preparation({key: value["string_value"] for key, value in parameters.items()})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself: one that is refused takes none with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            pictures = pb_utils.get_input_tensor_by_name(request, "picture").as_numpy().ravel()
            images = np.stack([self._prepared(content, place) for place, content in enumerate(pictures)])
            return pb_utils.InferenceResponse([pb_utils.Tensor("images", images)])
        except Exception as error:  # a damaged picture must not end what serves the others
            return pb_utils.InferenceResponse([], pb_utils.TritonError(str(error)))

    def _prepared(self, content: bytes, place: int) -> NDArray[Any]:
        try:
            return self.preparation(content)
        except Exception as error:  # decoders raise what they like on damaged pictures
            raise RefusedError(f"picture {place} of the request: {error}") from error


class Preparation:
    """What `timm.data.create_transform` makes for evaluation, and the reading before it, without PyTorch."""

    def __init__(self, settings: dict[str, str]) -> None:
        """`settings`: `preprocessing` (JSON in timm's terms), `input_size` (channels, height, width), `input` (`uint8`
        for pixels), `decode_bytes` and `decode_pixels`, the most of each that a picture may have."""
        prep = json.loads(settings["preprocessing"])
        channels, *size = json.loads(settings["input_size"])
        self.mode = MODES[channels]
        self.size = (int(size[0]), int(size[1]))  # height, width
        self.crop_mode: str = prep["crop_mode"]
        self.scaled = (math.floor(self.size[0] / prep["crop_pct"]), math.floor(self.size[1] / prep["crop_pct"]))
        self.resampling = Image.Resampling[prep["interpolation"].upper()]
        # Where the picture does not reach. timm pads with the mean in `border` alone.
        self.fill = (
            tuple(round(255 * value) for value in prep["mean"]) if self.crop_mode == "border" else (0,) * channels
        )
        mean, std = (np.array(prep[key], np.float32)[:, None, None] for key in ("mean", "std"))
        self.scale, self.shift = 1 / (255 * std), -mean / std
        self.as_pixels = settings["input"] == "uint8"
        self.most_bytes, self.most_pixels = int(settings["decode_bytes"]), int(settings["decode_pixels"])

    def __call__(self, content: bytes) -> NDArray[Any]:
        """A picture -> [C, H, W] FP32 normalised, or [H, W, C] uint8.

        Raises:
            RefusedError: it is too large, of another kind, or damaged.
        """
        values = np.asarray(self._centred(self._resized(self.decode(content))))
        pixels = values[:, :, None] if values.ndim == 2 else values
        if self.as_pixels:
            return pixels
        images: NDArray[np.float32] = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
        images *= self.scale
        images += self.shift
        return images

    def decode(self, content: bytes) -> Image.Image:
        """A picture in the model's mode: the first frame, deep greys scaled to 8 bits, alpha dropped.

        Raises:
            RefusedError: it is too large, of another kind, or damaged.
        """
        if len(content) > self.most_bytes:
            raise RefusedError(f"it has {len(content)} bytes, and at most {self.most_bytes} are taken")
        try:
            with Image.open(BytesIO(content), formats=KINDS) as image:
                if image.width * image.height > self.most_pixels:  # by its header: nothing is decoded yet
                    raise RefusedError(
                        f"it has {image.width} x {image.height} pixels, and at most {self.most_pixels} are taken"
                    )
                image.load()
                return _eight_bits(image).convert(self.mode)
        except UnidentifiedImageError:
            raise RefusedError(f"it is no picture of {', '.join(KINDS)}") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise RefusedError(f"it cannot be read: {error}") from None

    def _resized(self, image: Image.Image) -> Image.Image:
        (height, width), (tall, wide) = (image.height, image.width), self.scaled
        if self.crop_mode == "squash":
            size = (tall, wide)
        elif self.crop_mode == "border":
            size = _over(image, max(height / tall, width / wide))
        elif tall == wide:  # the shorter edge becomes that long; torchvision cuts what is left over
            short = min(height, width)
            size = (
                tall if height == short else int(tall * height / short),
                wide if width == short else int(wide * width / short),
            )
        else:
            size = _over(image, min(height / tall, width / wide))
        if size[0] * size[1] > MOST_RESIZED:
            raise RefusedError(f"it has {width} x {height} pixels, which is too long for its other side")
        return image.resize((size[1], size[0]), self.resampling)

    def _centred(self, image: Image.Image) -> Image.Image:
        """The middle; what is missing at an edge is filled first, then what is too much is cut."""
        height, width = self.size
        tall, wide = max(height, image.height), max(width, image.width)
        if (tall, wide) != (image.height, image.width):
            canvas = Image.new(self.mode, (wide, tall), self.fill if len(self.fill) > 1 else self.fill[0])
            canvas.paste(image, ((wide - image.width) // 2, (tall - image.height) // 2))
            image = canvas
        top, left = round((tall - height) / 2), round((wide - width) / 2)
        return image.crop((left, top, left + width, top + height))


def _over(image: Image.Image, ratio: float) -> tuple[int, int]:
    return round(image.height / ratio), round(image.width / ratio)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits scaled, which Pillow's own conversion would clip at 255."""
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        if image.mode.startswith("I;16") or values.max(initial=0) > 255:
            values /= 257
        return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    return image
