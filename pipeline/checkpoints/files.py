"""Reading a checkpoint file without running what is in it."""

import argparse
import pathlib
import re
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

from lowpass.pipeline.base.errors import InputError

_SCALAR, _RECONSTRUCT = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
_PATHS = {
    "PosixPath": pathlib.PurePosixPath,
    "WindowsPath": pathlib.PureWindowsPath,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}
# What training scripts keep beside the weights and what runs no code when it is read: their arguments, paths (of Python
# before and since 3.13), NumPy's scalars and arrays (of NumPy 1 and 2).
HARMLESS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    *((kind, f"builtins.{kind.__name__}") for kind in (list, dict, set, tuple, int, float, str, bool)),
    *((kind, f"{module}.{name}") for name, kind in _PATHS.items() for module in ("pathlib", "pathlib._local")),
    *((_SCALAR, f"{module}.multiarray.scalar") for module in ("numpy.core", "numpy._core")),
    *((_RECONSTRUCT, f"{module}.multiarray._reconstruct") for module in ("numpy.core", "numpy._core")),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDGSU"},
]


def read_checkpoint(path: Path) -> Any:
    """What a `.safetensors` or `.pth` file holds; pickles are read with `weights_only=True`.

    Raises:
        InputError: it is missing or truncated, or holds more than tensors and plain values: a pickled module or
            TorchScript. The message says how to turn it into safetensors.
    """
    try:
        if path.suffix == ".safetensors":
            # Not `load_file`: its tensors are mapped on the file, and change when that is rewritten in place.
            return load(path.read_bytes())
        if _is_torchscript(path):
            raise InputError(
                f"{path} is TorchScript, which is a program; in the environment that made it, run\n"
                f"{_remedy(path, 'torch.jit.load')}\nand give weights.safetensors"
            )
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"there are no weights at {path}") from None
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises anything, from struct.error to AttributeError
        if blocked := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            raise InputError(
                f"cannot read the weights {path}: a {blocked[1]} is pickled in it, and unpickling would run its code; "
                f"in the environment that made it, run\n{_remedy(path, 'torch.load')}\nand give weights.safetensors"
            ) from None
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        reason = said.splitlines()[0]
        raise InputError(f"cannot read the weights {path}: truncated or not a checkpoint ({reason[:120]})") from None


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, IsADirectoryError):
        return False


def _remedy(path: Path, load_with: str) -> str:
    """Two lines of Python that make safetensors of a whole module."""
    read = (
        f'{load_with}("{path.name}", map_location="cpu"{", weights_only=False" if load_with == "torch.load" else ""})'
    )
    return (
        f"  import torch; from safetensors.torch import save_file; model = {read}\n"
        '  save_file({k: v.contiguous() for k, v in model.state_dict().items()}, "weights.safetensors")'
    )
