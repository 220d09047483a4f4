"""The classifier among a ViT's weights, whatever its author called it."""

from collections.abc import Mapping

from torch import Tensor

from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.checkpoints.state_dict import HEADS


def classifier_layers(state: Mapping[str, Tensor]) -> list[str]:
    """The layers of what looks like a classifier, such as `head.1` of a dropout and a linear layer."""
    layers = {name.rpartition(".")[0] for name in state if name.startswith(HEADS)}
    return sorted(layers)


def with_head(state: dict[str, Tensor], head: str, source: object) -> dict[str, Tensor]:
    """The weights with their classifier called `head`, where it is one linear layer of another name.

    Args:
        state: under the model's own names.
        head: what the library calls its classifier, such as `head` or `heads.head`.
        source: where the weights come from, for the log.
    """
    found = classifier_layers(state)
    if len(found) != 1 or found[0] == head:
        return state
    weight, bias = (state.get(f"{found[0]}.{part}") for part in ("weight", "bias"))
    whole = {name for name in state if name.startswith(found[0] + ".")}
    if weight is None or weight.ndim != 2 or bias is None or len(whole) != 2:
        return state
    logger.info("classifier: %s of %s", found[0], source)
    renamed = {name: tensor for name, tensor in state.items() if name not in whole}
    return renamed | {f"{head}.weight": weight, f"{head}.bias": bias}
