"""Which whole part of a block, its attention or its MLP, is tried first, and how channels of the rest are chosen."""

from dataclasses import replace

from lowpass.pipeline.method.channels import ChannelChoice, best_channels
from lowpass.pipeline.method.sensitivity import ChannelScores
from lowpass.pipeline.model.whole_parts import Part
from lowpass.pipeline.search.shaping import Shaping, choose_shaped

NOTHING_GONE = frozenset[Part]()


def least_liked_first(scores: ChannelScores) -> tuple[Part, Part]:
    """The two parts of a block, that of the smaller sum of scores first; a score counts for each row that shares it."""
    attention = 2 * scores.step * float(scores.query_key.sum()) + float(scores.value.sum())
    mlp = scores.hidden_rows * float(scores.hidden.sum())
    return ("attention", "mlp") if attention <= mlp else ("mlp", "attention")


def gone_rows(scores: ChannelScores, gone: frozenset[Part]) -> int:
    """Query, key, value and hidden rows that go with whole parts."""
    hidden = scores.hidden_rows * len(scores.hidden)
    return ("mlp" in gone) * hidden + ("attention" in gone) * (scores.rows - hidden)


def choose_of_the_rest(scores: ChannelScores, n: int, shaping: Shaping, gone: frozenset[Part]) -> ChannelChoice:
    """`choose_shaped` for what is left of a block once whole parts are gone.

    Raises:
        ValueError: `n` is negative or leaves nothing.
    """
    if gone == {"attention"}:
        width = shaping.width(len(scores.hidden) - n // scores.hidden_rows, len(scores.hidden))
        return ChannelChoice((), (), (), best_channels(scores.hidden, width))
    if gone == {"mlp"}:
        return choose_shaped(replace(scores, hidden=scores.hidden[:0]), n, shaping)
    return choose_shaped(scores, n, shaping) if not gone else ChannelChoice((), (), (), ())
