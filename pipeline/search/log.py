"""A search is written down as it goes: `search.jsonl`, a header of what went in, then one line a decision."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.files import write_text
from lowpass.pipeline.base.launched import is_first
from lowpass.pipeline.base.processes import agreed, same_everywhere
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.data.datasets import Batches
from lowpass.pipeline.model.slim_vit import SlimViT
from lowpass.pipeline.search.log_entries import (
    ChannelDecision,
    ClassifierDecision,
    Curve,
    Entry,
    Plan,
    TokenDecision,
    in_a_line,
)

SEARCH_FILE = "search.jsonl"
E = TypeVar("E", TokenDecision, ChannelDecision, ClassifierDecision, Curve, Plan)


class SearchLog:
    """Entries of an interrupted search first, then new ones, each recorded before it is acted on."""

    def __init__(self, decided: Sequence[Entry] = (), record: Callable[[Entry], None] = lambda _entry: None) -> None:
        self._replay, self._record = iter(decided), record
        self.fresh = not decided

    def next(self, kind: type[E], decide: Callable[..., E], *arguments: Any) -> E:
        """The next entry: replayed, or `decide(*arguments)`.

        Raises:
            InputError: the interrupted search went another way.
        """
        entry = next(self._replay, None)
        if entry is None:
            made = decide(*arguments)
            self._record(made)
            return made
        if not isinstance(entry, kind):
            raise InputError(f"the search log holds a {entry.kind} decision out of order; give another --out")
        return entry


def open_log(path: Path, header: Mapping[str, object], model: SlimViT) -> SearchLog:
    """A log that replays what `path` holds and writes on there. Of several processes the first writes, once all have
    decided the same.

    Args:
        path: of `search.jsonl`.
        header: what went into the search; a log of other inputs is refused.
        model: what is pruned, in place: each entry is told beside how the model then stands.

    Raises:
        InputError: the file is damaged, or was written for other inputs; the message names what differs.
        RunError: another process has other inputs.
    """
    decided = agreed(lambda: _read(path, header))
    lines = [json.dumps(header), *(entry.model_dump_json() for entry in decided)]
    same_everywhere("what goes into the search", "\n".join(lines))
    dense_macs = model.architecture.macs()

    def record(entry: Entry) -> None:
        lines.append(entry.model_dump_json())
        same_everywhere(f"decision {len(lines) - 1} ({entry.kind})", lines[-1])
        if is_first():
            write_text(path, "\n".join(lines) + "\n")
        logger.info(in_a_line(entry, model.architecture, dense_macs))

    return SearchLog(decided, record)


def digest(batches: Batches) -> str:
    """SHA-256 of images and labels."""
    sum_ = hashlib.sha256()
    for images, labels in batches:
        sum_.update(images.numpy().tobytes())
        sum_.update(labels.numpy().tobytes())
    return sum_.hexdigest()


def read_log(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """The header and the entries of a `search.jsonl`.

    Raises:
        InputError: it is damaged.
        OSError: it cannot be read.
    """
    parse: Callable[[str], Entry] = TypeAdapter(Entry).validate_json
    try:
        first, *rest = path.read_text().splitlines()
        return dict(json.loads(first)), [parse(line) for line in rest]
    except (ValueError, TypeError, ValidationError):
        raise InputError(f"{path} is damaged; give another --out") from None


def _read(path: Path, header: Mapping[str, object]) -> list[Entry]:
    if not path.exists():
        return []
    written, entries = read_log(path)
    for key, value in header.items():
        if written.get(key) != value:
            raise InputError(f"{path}: {key} was {written.get(key)}, now it is {value}; give another --out")
    return entries
