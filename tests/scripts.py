"""Running an example as its heading says."""

import os
import subprocess
import sys
from pathlib import Path

from served import TRITON

ROOT = Path(__file__).parent.parent


def ran(name: str, folder: Path, *arguments: object) -> str:
    """What an example prints, whose temporary files go to `folder`."""
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    places = {"TMPDIR": str(folder), "LOWPASS_TRITON": str(TRITON)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | places)
    assert done.returncode == 0, done.stderr
    return done.stdout
