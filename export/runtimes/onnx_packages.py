"""Which ONNX Runtime is here: two packages, `onnxruntime` and `onnxruntime-gpu`, are imported by one name."""

import contextlib
import ctypes
import importlib.metadata
import io
from functools import cache
from pathlib import Path

import onnxruntime

PACKAGES = ("onnxruntime", "onnxruntime-gpu")


def available_providers() -> tuple[str, ...]:
    """What this build has; empty where the package is broken, as an uninstalled twin leaves it."""
    ask = getattr(onnxruntime, "get_available_providers", None)
    return () if ask is None else tuple(ask())


@cache
def preload() -> None:
    """Load the CUDA and cuDNN that pip installed, once a process, before the first session that needs them.

    ONNX Runtime before 1.21 cannot. Where there are none it prints so on standard output, which is left out: sessions
    say it, too.
    """
    load = getattr(onnxruntime, "preload_dlls", None)
    if load is not None:
        with contextlib.redirect_stdout(io.StringIO()):
            load()


def installed_packages() -> dict[str, str]:
    """The packages that claim to be installed, and their versions."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def onnxruntime_problems() -> list[str]:
    """What is wrong with ONNX Runtime here, each in a sentence with the remedy."""
    found = installed_packages()
    problems = []
    if not available_providers():
        again = found or {"onnxruntime": ""}
        problems.append(
            "onnxruntime is broken: its files are gone, as when its twin was uninstalled; "
            f"{_afresh('onnxruntime-gpu' if 'onnxruntime-gpu' in again else 'onnxruntime')}"
        )
    elif len(found) == len(PACKAGES):
        problems.append(
            f"{' and '.join(f'{name} {version}' for name, version in found.items())} are both installed in one folder: "
            f"the last installed wins ({onnxruntime.__version__} with {', '.join(available_providers())}), and "
            f"uninstalling either breaks both; {_afresh('onnxruntime-gpu')} (without a GPU: onnxruntime)"
        )
    if "CUDAExecutionProvider" in available_providers() and (obstacle := cuda_obstacle()) is not None:
        remedy = (
            "install NVIDIA's driver; on a machine without such a GPU onnxruntime will do"
            if "libcuda.so" in obstacle
            else "pip install 'onnxruntime-gpu[cuda,cudnn]', or a torch with the CUDA that it was built for"
        )
        problems.append(f"CUDA does not load in onnxruntime-gpu {onnxruntime.__version__} ({obstacle}); {remedy}")
    return problems


def cuda_obstacle() -> str | None:
    """Why the CUDA provider's library does not load, or None if it does. Needs no GPU."""
    preload()
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        for name in ("shared", "cuda"):  # the second calls into the first
            ctypes.CDLL(str(folder / f"libonnxruntime_providers_{name}.so"), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return None


def _afresh(package: str) -> str:
    return f"pip uninstall -y {' '.join(PACKAGES)} && pip install {package}"
