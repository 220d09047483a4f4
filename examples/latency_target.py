"""A target in milliseconds, on the runtime you deploy on.

Shows:  `target_latency` plans by what the parts of a block take on this machine, and measures the planned model as a
        whole before anything is cut. Here: ONNX Runtime on this CPU, batches of 32.
Prints: milliseconds of the dense model and of the target, what was planned and measured, and the shape that came of it.
Takes:  two to three minutes on two cores, without a network. The times are this machine's, and differ from run to run.
Run:    make .venv/.lowpass-ready && .venv/bin/python examples/latency_target.py
"""

# %% A dense model, and what it takes here.
import logging
import tempfile
from pathlib import Path

from small_digits import images, trained

import lowpass
from lowpass.benchmarks.latency.target import against_dense

BATCH = 32
dense = trained()
architecture = lowpass.SlimViT.from_timm(dense).architecture
dense_ms, _ = against_dense(architecture, architecture, "onnxruntime", "fp32", BATCH)
target = 0.7 * dense_ms
print(f"dense: {dense_ms:.3f} ms a batch of {BATCH}; target: {target:.3f} ms")

# %% The search. Its log says what it plans and measures.
logging.basicConfig(format="%(message)s")
logging.getLogger("lowpass").setLevel(logging.INFO)
run = lowpass.compress(
    dense,
    images(),
    Path(tempfile.mkdtemp(prefix="lowpass-")) / "fast",
    target_latency=target,
    runtime="onnxruntime",
    latency_batch=BATCH,
    tune_for="onnxruntime",
    score_images=256,
    measure_images=256,
)

# %% What came of it: fewer heads, narrower layers, fewer tokens, where this machine gains most by it.
for index, block in enumerate(run.architecture.blocks):
    print(f"block {index}: {block.heads} heads, hidden width {block.hidden}, {block.keep} tokens")
figures = run.metrics
print(f"MACs: {figures.slim.macs / figures.dense.macs:.2f} of dense, top-1 {figures.slim.top1:.1f}%")
print(f"run directory: {run.path}")
