"""The table of what loads, in docs/models-and-data.md, made of what the tests load: `python tests/what_loads.py`, or
with `--check` to see whether it still agrees."""

import re
import sys
from pathlib import Path

from families import FAMILIES
from test_checkpoints import WRAPPED
from test_sources import HUGGING_FACE

from lowpass.pipeline.checkpoints.torchvision_models import NAMES

DOCUMENT = Path(__file__).parents[1] / "docs" / "models-and-data.md"
BLOCK = re.compile(r"(<!-- what loads -->\n)(.*?)(<!-- /what loads -->)", re.DOTALL)


def table() -> str:
    """Every family, source and wrapping that a test loads and compares with the source's own logits."""
    rows = [("timm", family, f"`{like}`" if "(" not in like else "") for family, (_, like) in FAMILIES.items()]
    rows += [("Transformers", kind, f"`{model.__name__}`") for kind, (_, model, _) in HUGGING_FACE.items()]
    rows += [("torchvision", "ViT", ", ".join(f"`{name}`" for name in NAMES))]
    rows += [("timm's hub layout", "a folder with `config.json`, `local-dir:FOLDER`, `hf-hub:NAME`", "")]
    rows += [("a file", f"tensors: {wrapping}", "") for wrapping in WRAPPED]
    lines = ["| source | what | such as |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def agrees() -> bool:
    """Whether the document has the table."""
    found = BLOCK.search(DOCUMENT.read_text())
    return found is not None and found[2] == table()


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if agrees() else f"{DOCUMENT} differs from the tests: python tests/what_loads.py")
    DOCUMENT.write_text(BLOCK.sub(lambda block: block[1] + table() + block[3], DOCUMENT.read_text()))
