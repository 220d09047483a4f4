"""INT8 and FP8: what they cost in top-1, and what they save in bytes.

Shows:  `int8` is for CPUs; `int8-fp16` and `fp8` are for TensorRT, FP8 on Ada, Hopper and Blackwell. Layers that cost
        too much are found by measurement and left wider.
Prints: bytes, top-1 in ONNX Runtime on this CPU, and which layers were left out; kernels of each engine if TensorRT-RTX
        is installed, which needs no GPU to build.
Takes:  a minute on two cores, without a network.
Run:    make .venv/.lowpass-ready && .venv/bin/python examples/eight_bits.py
"""

# %% A slim model, fine-tuned: before that its margins can be too narrow for 8 bits.
import json
import tempfile
from pathlib import Path

import onnx
from small_digits import images, trained

import lowpass
from lowpass.export.evaluate import evaluate_deployed
from lowpass.export.runtimes.engine import installed_flavours

data = images()
out = Path(tempfile.mkdtemp(prefix="lowpass-")) / "small"
run = lowpass.compress(trained(), data, out, target_macs=0.5, score_images=256, measure_images=256)
print(f"PyTorch in FP32: top-1 {run.finetune(epochs=3).slim.top1:.1f}%")

# %% Files, each compared with PyTorch before it is written, and run as a CPU runs them. Opset 20 is read by older
# runtimes as well, and built by TensorRT-RTX 1.7 where a block has a single head.
for precision in ("fp32", "int8", "int8-fp16", "fp8"):
    file = run.export(precision, opset=20)
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    left_out = json.loads(metadata.get("left_out", "[]"))
    measured = evaluate_deployed(out, "onnxruntime", precision, data)
    print(f"{file.name}: {file.stat().st_size:,} bytes, top-1 {measured.top1:.1f}%, left out: {left_out or 'nothing'}")

# %% Engines for GPUs. `model.<precision>.layers.json` names every kernel.
if "tensorrt-rtx" in installed_flavours():
    for precision in ("int8-fp16", "fp8"):
        plan = run.build(precision, runtime="tensorrt-rtx")
        layers = json.loads(plan.with_suffix(".layers.json").read_text())
        print(f"{plan.name}: kernels", ", ".join(f"{at['whole']['kernels']} at batch {at['batch']}" for at in layers))
else:
    print("no engines: pip install 'lowpass-vit[tensorrt-rtx]'")
print(f"run directory: {out}")
