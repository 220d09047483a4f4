"""The tables of what loads, in docs/models-and-data.md, made of what the tests load: `python tests/what_loads.py`, or
with `--check` to see whether they still agree."""

import re
import sys
from pathlib import Path

from families import FAMILIES, ROTARY, refused_rotary
from test_checkpoints import WRAPPED
from test_huggingface_dinov3 import READS
from test_sources import HUGGING_FACE

from lowpass.pipeline.checkpoints.torchvision_models import NAMES

DOCUMENT = Path(__file__).parents[1] / "docs" / "models-and-data.md"
BLOCK = re.compile(r"(<!-- what loads -->\n)(.*?)(<!-- /what loads -->)", re.DOTALL)
ROTARY_BLOCK = re.compile(r"(<!-- rotary -->\n)(.*?)(<!-- /rotary -->)", re.DOTALL)


def table() -> str:
    """Every family, source and wrapping that a test loads and compares with the source's own logits."""
    both = FAMILIES | ROTARY
    rows = [("timm", family, f"`{like}`" if "(" not in like else "") for family, (_, like) in both.items()]
    rows += [("Transformers", kind, f"`{model.__name__}`") for kind, (_, model, _) in HUGGING_FACE.items()]
    rows += [("Transformers", f"DINOv3, reads {what}", "`DINOv3ViTModel` and a `classifier`") for what in READS]
    rows += [("torchvision", "ViT", ", ".join(f"`{name}`" for name in NAMES))]
    rows += [("timm's hub layout", "a folder with `config.json`, `local-dir:FOLDER`, `hf-hub:NAME`", "")]
    rows += [("a file", f"tensors: {wrapping}", "") for wrapping in WRAPPED]
    lines = ["| source | what | such as |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def rotary_table() -> str:
    """How many of timm's models with rotary positions are accepted, and why others are not."""
    count, reasons = refused_rotary()
    rows = [("accepted", count - sum(map(len, reasons.values())), "")]
    rows += [(reason, len(names), f"`{names[0]}`") for reason, names in sorted(reasons.items())]
    lines = [f"| of {count} | models | such as |", "|---|--:|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    return "\n".join(lines) + "\n"


def agrees() -> bool:
    """Whether the document has the table."""
    found = BLOCK.search(DOCUMENT.read_text())
    return found is not None and found[2] == table()


def rotary_agrees() -> bool:
    """Whether the document has the count of models with rotary positions."""
    found = ROTARY_BLOCK.search(DOCUMENT.read_text())
    return found is not None and found[2] == rotary_table()


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            0 if agrees() and rotary_agrees() else f"{DOCUMENT} differs from the tests: python tests/what_loads.py"
        )
    written = BLOCK.sub(lambda block: block[1] + table() + block[3], DOCUMENT.read_text())
    DOCUMENT.write_text(ROTARY_BLOCK.sub(lambda block: block[1] + rotary_table() + block[3], written))
