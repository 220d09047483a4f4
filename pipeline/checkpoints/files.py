"""Reading a checkpoint file without running what is in it."""

import argparse
import json
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

INDEX = ".index.json"
START = 512  # bytes that tell a format
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
    """What a safetensors or PyTorch file holds, whatever it is called; pickles are read with `weights_only=True`. Of an
    index (`*.index.json`), all the files that it lists.

    Raises:
        InputError: it is missing, truncated or of another format, or holds more than tensors and plain values: a
            pickled module or TorchScript. The message says how to turn it into safetensors.
    """
    if path.name.endswith(INDEX):
        return _sharded(path)
    start = _start(path)
    if foreign := _foreign(path, start):
        raise InputError(f"cannot read the weights {path}: {foreign}")
    if _is_torchscript(path):
        raise InputError(
            f"{path} is TorchScript, which is a program; in the environment that made it, run\n"
            f"{_remedy(path, 'torch.jit.load')}\nand give weights.safetensors"
        )
    try:
        if start[8:9] == b"{":
            # Not `load_file`: its tensors are mapped on the file, and change when that is rewritten in place.
            return load(path.read_bytes())
        # Not the path: by that torch would go by the name, too.
        with torch.serialization.safe_globals(HARMLESS), path.open("rb") as file:
            return torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything, from struct.error to AttributeError
        if blocked := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            raise InputError(
                f"cannot read the weights {path}: a {blocked[1]} is pickled in it, and unpickling would run its code; "
                f"in the environment that made it, run\n{_remedy(path, 'torch.load')}\nand give weights.safetensors"
            ) from None
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        reason = said.splitlines()[0]
        raise InputError(f"cannot read the weights {path}: truncated or not a checkpoint ({reason[:120]})") from None


def _start(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        InputError: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            return file.read(START)
    except FileNotFoundError:
        raise InputError(f"there are no weights at {path}") from None
    except IsADirectoryError:
        raise InputError(
            f"cannot read the weights {path}: it is a folder; give the file in it, or the folder as --model"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read the weights {path}: {error.strerror}") from None


def index_files(index: Path) -> dict[str, list[str]]:
    """The files that an index of Transformers' lists, each with the names of its tensors.

    Raises:
        InputError: it is no such index.
    """
    try:
        listed = json.loads(index.read_bytes())["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file in listed.items():
            files.setdefault(Path(file).name, []).append(name)
    except FileNotFoundError:
        raise InputError(f"there are no weights at {index}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index} is no index of weights: it should be JSON with a `weight_map`") from None
    return files


def _sharded(index: Path) -> dict[str, Any]:
    """The tensors that an index lists, and no other that may lie beside them."""
    whole: dict[str, Any] = {}
    for file, names in sorted(index_files(index).items()):
        if not (index.parent / file).exists():
            raise InputError(f"there is no {index.parent / file}, which {index.name} lists; copy it, too")
        content = read_checkpoint(index.parent / file)
        for name in names:
            if not isinstance(content, dict) or name not in content:
                raise InputError(f"{index.parent / file} has no {name}, against what {index.name} says; save both anew")
            whole[name] = content[name]
    return whole


def _foreign(path: Path, start: bytes) -> str | None:
    """What a file is that holds no weights of PyTorch's, and what to do; None: it may."""
    if not start:
        return "truncated or not a checkpoint (it is empty)"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself; get that with `git lfs pull`"
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!")):
        return "it is compressed; unpack it first"
    if start[257:262] == b"ustar":
        return "it is an archive; unpack it, and give the file in it"
    if start.startswith(b"\x89HDF"):
        return "it is HDF5, as Keras writes; lowpass takes PyTorch's weights and safetensors"
    if start.startswith(b"\x93NUMPY") or _names_in_zip(path, ".npy"):
        return (
            "it is NumPy's format; Google's ViTs become a state dict by\n"
            f'  import timm, torch; model = timm.create_model(NAME, num_classes=N, checkpoint_path="{path.name}")\n'
            '  torch.save(model.state_dict(), "weights.pth")'
        )
    if path.suffix == ".onnx":
        return "it is ONNX, a graph whose weights have lost their names; give the PyTorch checkpoint it was made from"
    if zipfile.is_zipfile(path) and not _names_in_zip(path, "data.pkl"):
        return "it is an archive; unpack it, and give the file in it"
    if start[:1] in b"<{[#" or (start.isascii() and start[:64].decode().isprintable()):
        return "it is text"
    return None


def _names_in_zip(path: Path, end: str) -> bool:
    """Whether something in a zip archive is so called."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(end) for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _is_torchscript(path: Path) -> bool:
    return _names_in_zip(path, "/constants.pkl")


def _remedy(path: Path, load_with: str) -> str:
    """Two lines of Python that make safetensors of a whole module."""
    read = (
        f'{load_with}("{path.name}", map_location="cpu"{", weights_only=False" if load_with == "torch.load" else ""})'
    )
    return (
        f"  import torch; from safetensors.torch import save_file; model = {read}\n"
        '  save_file({k: v.contiguous() for k, v in model.state_dict().items()}, "weights.safetensors")'
    )
