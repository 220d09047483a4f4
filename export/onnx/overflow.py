"""What would overflow in a real FP16 engine: found on real images, mended where a few layers in FP32 do, or refused."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx

from lowpass.export.graph.keep_fp32 import layer_of
from lowpass.export.onnx.half import LARGEST_HALF, MOVES, Magnitude, half_tensors, infinite_weights, magnitudes
from lowpass.export.runtimes.session import Images
from lowpass.pipeline.base.errors import RunError
from lowpass.pipeline.base.progress import logger

WARNED = LARGEST_HALF / 2
MOST_KEPT = 4  # layers that are kept in FP32 unasked, such as two blocks' MLPs
NameImage = Callable[[int], str]


@dataclass(frozen=True)
class Overflow:
    """What does not fit into FP16: the largest magnitude of all tensors, what is wrong in words (None: nothing), and
    the layers that have to do with it, which may be kept in FP32."""

    largest: Magnitude
    wrong: str | None = None
    layers: tuple[str, ...] = ()


def find_overflow(file: str, content: bytes, batches: Iterable[Images], name_image: NameImage) -> Overflow | None:
    """Look at every FP16 tensor of a file on normalised images [B, C, H, W]; None: it has none. From half of 65,504 a
    warning is logged."""
    model = onnx.load_model_from_string(content)
    lost = infinite_weights(model)
    if lost:  # magnitudes would say nothing
        nodes = {node.name: node for node in model.graph.node}
        name, reader = lost[0]
        layers = _layers(model, [output for _, node in lost if node in nodes for output in nodes[node].output])
        wrong = f"{name}, which {reader} reads, is infinite in FP16"
        return Overflow(Magnitude(reader, name, float("inf"), None), wrong, layers)
    if not half_tensors(model):
        return None
    found = magnitudes(content, batches, f"looking for overflow in {file}")
    largest = max(found, key=lambda one: one.value)
    over = [one for one in found if not one.value <= LARGEST_HALF]
    if over:
        first = over[0]
        wrong = f"{first.node} reaches {_place(first, name_image)}, beyond FP16's {LARGEST_HALF:.0f}"
        return Overflow(largest, wrong, _layers(model, [one.tensor for one in over]))
    if largest.value >= WARNED:
        layers = _layers(model, [largest.tensor])
        place = _place(largest, name_image)
        logger.warning(
            f"{file}: {largest.node} reaches {place}, more than half of FP16's {LARGEST_HALF:.0f}; other images may "
            f"overflow ({remedy(layers)})"
        )
    return Overflow(largest)


def further_layers(file: str, found: Overflow, kept: Sequence[str], mendable: bool) -> tuple[str, ...]:
    """The layers to keep in FP32 now, those of `kept` among them.

    Raises:
        RunError: keeping layers does not help, or more than `MOST_KEPT` would have to be.
    """
    more = tuple(layer for layer in found.layers if layer not in kept)
    if not mendable or not more or len({*kept, *more}) > max(MOST_KEPT, len(kept)):
        raise RunError(f"{file}: {found.wrong}; it was not written ({remedy(more if mendable else ())})")
    logger.info(f"{file}: {found.wrong}; kept in FP32: {', '.join(more)}")
    return (*kept, *more)


def remedy(layers: Sequence[str]) -> str:
    """What to do about an overflow, in words."""
    if not layers:
        return "export bf16"
    return "export bf16, or keep layers in FP32: " + " ".join(f"--keep-fp32 {layer}" for layer in layers)


def _place(one: Magnitude, name_image: NameImage) -> str:
    return f"{one.value:.3g}" + ("" if one.image is None else f" on {name_image(one.image)}")


def _layers(model: onnx.ModelProto, tensors: Sequence[str]) -> tuple[str, ...]:
    """The layers that give or read one of the tensors, in the order of the graph."""
    wanted, layers = set(tensors), dict[str, None]()
    for node in model.graph.node:
        if (wanted & {*node.input, *node.output}) and (layer := layer_of(node.name)):
            layers[layer] = None
        if node.op_type in MOVES and wanted & set(node.input):
            wanted |= set(node.output)
    return tuple(layers)
