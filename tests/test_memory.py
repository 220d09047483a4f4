"""Native runtimes leave the process sound: after every export in every runtime, plain PyTorch trains as it would have.

Damaged memory once showed as a NaN loss or an impossible label late in a process that had traced models and called
runtimes. Weights after training are compared bit for bit with those of a process that did nothing else before.
"""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lowpass.export.batch import BatchProfile
from lowpass.export.graph.deployable import deployable
from lowpass.export.onnx.quantize import Quantization, quantize
from lowpass.export.onnx.quantize_half import quantize_half
from lowpass.export.onnx.trace import to_onnx
from lowpass.export.options import PRECISIONS, QUANTISED, ExportOptions
from lowpass.export.runtimes.engine import compile_engine, installed_flavours
from lowpass.export.runtimes.onnx_runtime import OnnxRuntime, widened
from lowpass.export.runtimes.openvino import OpenVino
from lowpass.export.runtimes.pytorch import PyTorch
from lowpass.export.runtimes.registry import SUPPORTED
from lowpass.export.runtimes.session import logits_of
from lowpass.pipeline.data.digits import DigitScenes
from lowpass.pipeline.model.slim_vit import SlimViT

ROUNDS = 2
STEPS = 12


def dense(seed: int) -> SlimViT:
    torch.manual_seed(seed)
    return SlimViT.from_timm(timm.create_model("tiny_deit"), token_score="cls")


def trained(seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of some steps on the digits; every label must be one."""
    model = dense(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    loader: Any = DataLoader(DigitScenes("train", seed=seed), 32)
    for step, (images, labels) in enumerate(loader):
        assert images.isfinite().all() and ((labels >= 0) & (labels < 10)).all()
        loss = F.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        if step == STEPS:
            break
    return losses, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def use_every_runtime(seed: int) -> None:
    """Every precision exported, run in each CPU runtime and built for TensorRT, with inputs that go away at once."""
    model = dense(seed).eval()
    model.set_keep(1, 40)
    for precision in PRECISIONS:
        graph = to_onnx(model, ExportOptions(precision=precision))
        if precision == "int8":
            graph, _ = quantize(graph, Quantization([noise(4)]))
        elif precision in QUANTISED:
            graph, _ = quantize_half(graph, Quantization([noise(4)]), precision)
        content = graph.SerializeToString()
        sessions = [OnnxRuntime(widened(content) if precision == "bf16" else content)]
        sessions += [OpenVino(content, precision)] if precision in SUPPORTED["openvino"] else []  # type: ignore[list-item]
        for session in sessions:
            for batch in (1, 3):
                assert np.isfinite(logits_of(session, noise(batch))).all()
        if precision in ("fp16", "int8-fp16") and "tensorrt-rtx" in installed_flavours():
            compile_engine("tensorrt-rtx", content, BatchProfile.parse("1:2:4"))
    assert np.isfinite(logits_of(PyTorch(deployable(model)), noise(2))).all()
    gc.collect()


def noise(batch: int) -> Any:
    return np.random.default_rng(batch).standard_normal((batch, 3, 32, 32), np.float32)


def test_training_after_every_runtime_is_what_it_was_before() -> None:
    pytest.importorskip("openvino")
    before = [trained(seed) for seed in range(ROUNDS)]
    for seed, (losses, weights) in enumerate(before):
        use_every_runtime(seed)
        again, after = trained(seed)
        assert np.isfinite(again).all() and again == losses
        assert all(torch.equal(tensor, after[name]) for name, tensor in weights.items())


def test_weights_do_not_change_with_the_file_they_were_read_from(tmp_path: Path) -> None:
    """`safetensors.load_file` maps the file: rewritten in place, the tensors in memory change with it."""
    from safetensors.torch import save_file

    from lowpass.pipeline.checkpoints.state_dict import read_weights

    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    read = read_weights(path).state["a"]
    with path.open("r+b") as file:
        file.seek(200)
        file.write(b"\xff" * 3000)
    assert torch.equal(read, torch.ones(1000))


# Sessions that go in the order they came, then a signal that Python handles: on the stack that the thread has for it.
SIGNALLED = """
import gc, os, signal, sys
import numpy as np
from lowpass.export.runtimes.openvino import OpenVino
from lowpass.export.runtimes.session import logits_of

content = open(sys.argv[1], "rb").read()
first, second = OpenVino(content, "fp32"), OpenVino(content, "fp32")
for session in (first, second):
    logits_of(session, np.zeros((1, 3, 32, 32), np.float32))
del session, first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGCHLD)
"""


def test_signals_are_handled_after_openvino(tmp_path: Path) -> None:
    """The cause of the lost test processes, see `_core` in `export/runtimes/openvino.py`."""
    pytest.importorskip("openvino")
    path = tmp_path / "model.onnx"
    path.write_bytes(to_onnx(dense(0).eval(), ExportOptions()).SerializeToString())
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", SIGNALLED, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
