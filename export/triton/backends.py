"""The Python backend of Triton's wheel, set up for its virtual environment and for a model.py that is taken away."""

import os
from pathlib import Path

from lowpass.pipeline.base.errors import InputError

STUB = "triton_python_backend_stub"
OURS = Path(__file__).parent / "backend"


def set_up(folder: Path, bundle: Path) -> Path:
    """The wheel's Python backend with the stub of its virtual environment's Python, as links.

    Args:
        folder: where to; it stays as long as the server.
        bundle: the wheel's `tritonserver`.

    Returns:
        What the server is to look for backends in.

    Raises:
        InputError: the wheel has none for that Python.
    """
    python = folder / "backends" / "python"
    if not python.exists():
        version = bundle.parents[2].name.removeprefix("python")
        stub = bundle / "python_backend_stubs" / version / STUB
        if not stub.is_file():
            raise InputError(f"the Triton wheel has no stub for Python {version}; make triton PYTHON=python3.11")
        python.mkdir(parents=True)
        for file in (bundle / "backends" / "python").glob("*.*"):
            (python / file.name).symlink_to(file)
        (folder / "stub").symlink_to(stub)
        (folder / "gone" / "1").mkdir(parents=True)
        (folder / "gone" / "1" / "model.py").symlink_to((OURS / "gone.py").absolute())
        start = (OURS / "stub.sh").absolute()
        # Copies of a package may have lost what says that a file can be run.
        (python / STUB).symlink_to(start if os.access(start, os.X_OK) else stub)
    return python.parent
