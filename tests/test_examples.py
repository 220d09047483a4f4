"""What the documentation shows runs: examples in docstrings, the quickstart, and its notebook."""

import ast
import doctest
import importlib
from pathlib import Path

import nbformat
import pytest
from notebook import EXAMPLES, NOTEBOOK, executed, made, pictures_in
from scripts import ROOT, ran

import lowpass

SCRIPTS = [
    path for path in sorted(EXAMPLES.rglob("*")) if path.suffix in (".py", ".cpp") and path.name != "small_digits.py"
]
WITH_EXAMPLES = {
    name: home
    for name, home in lowpass._HOMES.items()
    if name not in ("ChannelChoice", "ChannelScores", "InputError", "RunError", "Step")  # what others return or raise
}


@pytest.mark.parametrize("name", sorted(WITH_EXAMPLES))
def test_every_public_function_has_an_example_that_runs(name: str) -> None:
    module = importlib.import_module(f"lowpass.{WITH_EXAMPLES[name]}")
    found = [one for one in doctest.DocTestFinder().find(getattr(lowpass, name), name, module) if one.examples]
    assert found
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for one in found:
        one.globs |= vars(module)
        assert runner.run(one).failed == 0


def heading(path: Path) -> str:
    """What an example says of itself."""
    text = path.read_text()
    return ast.get_docstring(ast.parse(text)) or "" if path.suffix == ".py" else text.split("#include")[0]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_an_example_says_what_it_shows_and_how_to_run_it(path: Path) -> None:
    said, name = heading(path), str(path.relative_to(ROOT))
    assert all(f"{what}:" in said for what in ("Prints", "Takes", "Run")) and name in said.split("Run:")[1]
    assert f"({path.relative_to(EXAMPLES)})" in (EXAMPLES / "README.md").read_text()


def test_the_quickstart_runs(tmp_path: Path) -> None:
    said = ran("quickstart.py", tmp_path)
    assert "model.fp32.onnx: the largest logit difference" in said and "MACs: 0.49" in said
    (folder,) = tmp_path.glob("lowpass-*")
    assert {path.name for path in folder.iterdir()} == {"digits", "blocks.png", "tokens.png"}
    assert (folder / "digits" / "model.fp32.onnx").exists()


def test_the_notebook_is_the_quickstart_with_its_pictures() -> None:
    """`python tests/notebook.py` makes it anew."""
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert [(cell.cell_type, cell.source) for cell in book.cells] == [(c.cell_type, c.source) for c in made().cells]
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code") and pictures_in(book) == 2
    assert str(ROOT) not in NOTEBOOK.read_text() and "/lowpass-" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    book = executed(nbformat.read(NOTEBOOK, as_version=4))
    assert pictures_in(book) == 2
    assert "MACs: 0.49" in str(book.cells) and "model.fp32.onnx: the largest logit difference" in str(book.cells)
