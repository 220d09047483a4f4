"""lowpass from Python, cell by cell, on the embedded digits: about a minute on two cores.

python examples/quickstart.py [FOLDER]
"""

# %% A dense model, and images. Yours would be a timm name with weights=FILE, or any plain timm ViT in memory.
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch

import lowpass

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="lowpass-"))
dense = lowpass.load_model("digits_deit")

# %% Search a slim model with half of the multiply-accumulates. Few images keep this short; the defaults take thousands.
run = lowpass.compress(
    dense,
    "digits",
    folder / "digits",
    target_macs=0.5,
    score_images=128,
    measure_images=64,
    progress=lambda step: print(f"{step.description}: {step.done}") if step.finished else None,
)
figures = run.metrics
print(f"MACs: {figures.slim.macs / figures.dense.macs:.3f} of dense")
print(f"top-1: {figures.dense.top1:.2f}% dense, {figures.slim.top1:.2f}% slim, without any training")

# %% What is left of each block: heads, their sizes, hidden width, and the tokens passed on.
for index, block in enumerate(run.architecture.blocks):
    print(index, block.heads, block.qk_dim, block.v_dim, block.hidden, block.keep)

# %% The slim model is a torch module.
torch.manual_seed(0)
images = torch.rand(4, 3, 32, 32)
with torch.inference_mode():
    expected = run.slim(images)

# %% Export: the file is written only if it agrees with PyTorch on real images. Then run it where you like.
file = run.export("fp32")
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
(logits,) = session.run(["logits"], {"images": images.numpy()})
difference = abs(logits - expected.numpy()).max()
assert difference < 1e-3, difference
print(f"{file.name}: the largest logit difference from PyTorch is {difference:.1e}")
print(f"classes: {', '.join(run.classes)}; run directory: {run.path}")
