"""Which class is which logit: names in one order, the same in every process.

A run keeps them in `classes.json` (`pipeline/model/classes.py`).
"""

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowpass.pipeline.base.errors import InputError
from lowpass.pipeline.base.progress import logger
from lowpass.pipeline.data.options import ClassOrder, DataOptions

SHOWN = 3  # names that a message gives


@dataclass(frozen=True)
class Classes:
    """Names in the order of the labels. `rows`: the logits of the model that they are, where it has others besides."""

    names: tuple[str, ...]
    rows: tuple[int, ...] | None = None


def spelled(name: str) -> str:
    """A class name as it is compared and kept. Accents come in one character or two, by the system that a folder was
    made on, and what is no Unicode at all is written out (`\\udce9`)."""
    return unicodedata.normalize("NFC", name.encode(errors="backslashreplace").decode())


def ordered(names: Iterable[str], order: ClassOrder) -> tuple[str, ...]:
    """Class names in the order in which they are numbered.

    `natural` is timm's (1, 2, 10; case does not count), `plain` torchvision's and Hugging Face's (1, 10, 2; capitals
    first). Names that tie under timm's order, such as `1` and `01`, follow the plain one; timm has them in hash order.
    """
    return tuple(sorted(names, key=None if order == "plain" else lambda name: (_natural(name.lower()), name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Digits by their value, before letters."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if number % 2 else (-1, part) for number, part in enumerate(parts)]


def arrange(own: Sequence[str], num_classes: int, options: DataOptions, name: str) -> Classes:
    """The classes of a data set in the order of a model's logits.

    Args:
        own: names of the data's classes, in the order that they have when nobody says otherwise.
        num_classes: of the model.
        options: who names the classes, if anybody does, and how they are ordered otherwise.
        name: of the data, for messages.

    Raises:
        InputError: the data has other classes than the model.
    """
    named = None if options.classes is None else tuple(map(spelled, options.classes))
    if named is not None and len(named) == num_classes:
        if twice := [each for each, count in Counter(named).items() if count > 1 and each in set(own)]:
            raise InputError(
                f"{options.classes_from} calls {named.count(twice[0])} classes {twice[0]!r}, which {name} has; "
                "tell them apart in --classes FILE, and in the data"
            )
        unknown = [each for each in own if each not in set(named)]
        if not unknown:
            if len(own) == len(named) or not options.cut:
                return Classes(named)
            rows = tuple(row for row, each in enumerate(named) if each in set(own))
            logger.info(
                "classes: %d of the model's %d, by the names of %s; its head is cut to them",
                len(rows),
                num_classes,
                options.classes_from,
            )
            return Classes(tuple(named[row] for row in rows), rows)
        if options.exact:
            raise InputError(
                f"{name} has classes that {options.classes_from} does not name, such as {', '.join(unknown[:SHOWN])}; "
                f"it names {', '.join(named[:SHOWN])} and so on"
            )
        logger.info(
            "classes: %s calls them otherwise (%s, where the data has %s); numbered by the data's own order",
            options.classes_from,
            named[0],
            unknown[0],
        )
    if len(own) != num_classes:
        raise InputError(
            f"{name} has {len(own)} classes, but the model has {num_classes}; give the data the model was trained on, "
            "weights trained on this data, or --classes FILE with the model's class names, a line each (the data's are "
            f"called {', '.join(own[:SHOWN])}{'' if len(own) <= SHOWN else ' and so on'})"
        )
    return Classes(tuple(own))


def read_class_names(path: Path, num_classes: int) -> tuple[str, ...]:
    """Names in the order of the logits, a line each.

    Raises:
        InputError: the file is missing, or does not name as many classes as the model has, each once.
    """
    names = read_lines(path)
    if len(names) != num_classes:
        raise InputError(f"{path} names {len(names)} classes, but the model has {num_classes}; it takes a name a line")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{path} names {twice[0]!r} twice")
    return tuple(names)


def read_lines(path: Path) -> list[str]:
    """A file of class names, a line each, as they are kept. Its encoding is UTF-8, or UTF-16 as Windows marks it.

    Raises:
        InputError: it is missing, or no text.
    """
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the class names {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is not text; --classes takes a class name a line, in the order of the logits"
        ) from None
    return [spelled(line.strip()) for line in text.splitlines() if line.strip()]
