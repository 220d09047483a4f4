"""What the documentation shows runs: examples in docstrings, and the quickstart."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lowpass

ROOT = Path(__file__).parent.parent
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


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "model.fp32.onnx: the largest logit difference" in done.stdout
    assert (tmp_path / "digits" / "model.fp32.onnx").exists()
