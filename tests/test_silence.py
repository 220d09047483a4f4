"""lowpass sends nothing anywhere: every library that it imports is watched while it is imported and used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowpass.pipeline.base.privacy import SWITCHES

WATCH = """
import json, os, sys, time
from pathlib import Path

seen = []
WATCHED = ("os.fork", "os.forkpty", "os.posix_spawn", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname")


def watch(event, arguments):
    if event in WATCHED:
        seen.append([event, str(arguments[1:])[:80]])


def connections():
    '''What the sockets of this process are connected to, native code's as well.'''
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{fd}").removeprefix("socket:[").rstrip("]"))
        except OSError:
            pass
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/self/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and set(fields[2]) - set("0:"):
                yield [kind, fields[2]]


sys.addaudithook(watch)
os.register_at_fork(before=lambda: seen.append(["fork", ""]))
"""
WAIT = """
until = time.monotonic() + 6  # for threads that report on what was done
while time.monotonic() < until:
    seen += connections()
    time.sleep(0.02)
print(json.dumps(seen))
"""
# Imports what lowpass imports, and runs a model in either CPU runtime.
THROUGH_LOWPASS = """
import lowpass
import accelerate, datasets, huggingface_hub, matplotlib, onnx, onnxruntime, timm, torch, torch_pruning, torchvision
import tritonclient.grpc, tritonclient.http
import lowpass.api, lowpass.benchmarks.latency.compare, lowpass.export.artefacts, lowpass.export.triton.repository
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.options import ExportOptions
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime
from lowpass.export.runtimes.openvino import OpenVino
from lowpass.export.runtimes.session import logits_of

accelerate.Accelerator()
slim = lowpass.SlimViT.from_timm(lowpass.load_model("digits_deit"))
content = to_onnx(slim, ExportOptions()).SerializeToString()
images = torch.zeros(2, 3, 32, 32).numpy()
logits_of(OnnxRuntime(content), images)
logits_of(OpenVino(content, "fp32"), images)
"""
ALONE = {"openvino": "import openvino", "onnxruntime": "import onnxruntime; onnxruntime.SessionOptions()"}


def watched(code: str, home: Path) -> tuple[list[list[str]], list[str]]:
    """What was forked or connected to, and what was written into an empty home folder."""
    home.mkdir()
    unset = ("CI", "XDG_CACHE_HOME", "PYTEST_CURRENT_TEST", "PYTEST_VERSION", *SWITCHES)
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HOME": str(home), "MPLCONFIGDIR": str(home.parent / "matplotlib")}
    done = subprocess.run(
        [sys.executable, "-c", WATCH + code + WAIT], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    events = json.loads(done.stdout.strip().splitlines()[-1])
    return events, sorted(str(file.relative_to(home)) for file in home.rglob("*") if file.is_file())


def test_nothing_is_sent_forked_or_written(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    assert watched(THROUGH_LOWPASS, tmp_path / "home") == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("library", list(ALONE))
def test_what_a_library_does_alone_is_caught(library: str, tmp_path: Path) -> None:
    """So that the test above can fail."""
    pytest.importorskip(library)
    events, written = watched(ALONE[library], tmp_path / "home")
    assert events or written
