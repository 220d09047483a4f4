"""The notebook of the first example: `examples/quickstart.py`, cell by cell, executed.

python tests/notebook.py      # writes examples/quickstart.ipynb anew
"""

import ast
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT, NOTEBOOK = EXAMPLES / "quickstart.py", EXAMPLES / "quickstart.ipynb"
TIMEOUT_S = 600  # of a cell
PLACE = re.compile(r"/\S*/lowpass-\w+")  # a temporary folder of this machine


def made() -> NotebookNode:
    """The notebook of the script, not executed: its docstring, then a heading and the code of each cell."""
    text = SCRIPT.read_text()
    (about,), cells = [ast.get_docstring(ast.parse(text))], re.split(r"^# %% ", text, flags=re.MULTILINE)[1:]
    book = new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    book.cells.append(new_markdown_cell(f"# Quickstart\n\n{(about or '').splitlines()[0].split('.')[0]}."))
    for cell in cells:
        heading, code = cell.split("\n", 1)
        book.cells += [new_markdown_cell(heading), new_code_cell(code.strip())]
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"
    return book


def executed(book: NotebookNode) -> NotebookNode:
    """The same notebook with its outputs, which name no place of this machine.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    where = {"metadata": {"path": str(EXAMPLES)}}
    NotebookClient(book, timeout=TIMEOUT_S, resources=where, record_timing=False).execute()
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:
                    output.text = PLACE.sub("FOLDER", output.text)
    return book


def code_of(book: NotebookNode) -> list[str]:
    """The code of a notebook's cells."""
    return [cell.source for cell in book.cells if cell.cell_type == "code"]


def pictures_in(book: NotebookNode) -> int:
    """How many pictures a notebook shows."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


if __name__ == "__main__":
    nbformat.write(executed(made()), NOTEBOOK)
