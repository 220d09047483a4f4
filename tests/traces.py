"""Traces of the same model are made once for all test files: half of the tests' time went into them.

Two traces of one model are the same bytes (`test_export.py::test_same_weights_same_bytes`, which traces anew).
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
from filelock import FileLock
from torch.onnx._internal.exporter._registration import ONNXRegistry

import lowpass.export.onnx.file
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.options import ExportOptions
from lowpass.pipeline.base.files import write_bytes
from lowpass.pipeline.model.slim_vit import SlimViT

# What else there is in `ExportOptions` comes after the trace.
TRACED = {"precision", "selection", "input", "keep_fp32"}


@contextmanager
def traced_once(folder: Path) -> Iterator[None]:
    """Within it, an export looks for its graph in `folder` first, which test processes share."""
    anew = ONNXRegistry.from_torchlib.__func__  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowpass.export.onnx.file, "to_onnx", _kept_in(folder))
        # The exporter reads its table of operators anew for every file, which takes half a second.
        patch.setattr(ONNXRegistry, "from_torchlib", classmethod(cache(anew)))
        yield


def _kept_in(folder: Path) -> Callable[[SlimViT, ExportOptions], onnx.ModelProto]:
    def traced(slim: SlimViT, options: ExportOptions) -> onnx.ModelProto:
        path = folder / f"{_key(slim, options)}.onnx"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                write_bytes(path, to_onnx(slim, options).SerializeToString())
        return onnx.load_model_from_string(path.read_bytes())

    return traced


def _key(slim: SlimViT, options: ExportOptions) -> str:
    """Changes with everything that a graph is made from, a patched function among it."""
    said: list[Any] = [slim.architecture.model_dump_json(), options.model_dump_json(include=TRACED)]
    for name, module in sorted(sys.modules.items()):
        if name.startswith(("lowpass.export.graph.", "lowpass.pipeline.model.", "lowpass.pipeline.method.")):
            said += [(name, here, getattr(what, "__qualname__", "")) for here, what in sorted(vars(module).items())]
    digest = hashlib.sha256(repr(said).encode())
    for name, tensor in (*slim.named_parameters(), *slim.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()
