"""lowpass from Python, cell by cell, on the embedded digits. quickstart.ipynb is the same with its pictures.

Shows:  search, the shape of what is left, what it looks at, export, and the same logits in ONNX Runtime.
Prints: MACs and top-1 of dense and slim, a line a block, and how far ONNX Runtime is from PyTorch.
Takes:  a minute on two cores, without a network.
Run:    make .venv/.lowpass-ready && .venv/bin/python examples/quickstart.py
"""

# %% A dense model, and images. Yours would be a timm name with weights=FILE, or any plain timm ViT in memory.
import tempfile
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import onnxruntime
import torch
from torchvision.transforms.functional import to_pil_image

import lowpass
from lowpass.pipeline.data.digits import DigitScenes

folder = Path(tempfile.mkdtemp(prefix="lowpass-"))
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
blocks = run.architecture.blocks
for index, block in enumerate(blocks):
    print(index, block.heads, block.qk_dim, block.v_dim, block.hidden, block.keep)
figure, (widths, tokens) = plt.subplots(1, 2, figsize=(9, 2.5))
widths.bar(range(len(blocks)), [block.hidden for block in blocks])
widths.set(title="hidden width", xlabel="block")
tokens.bar(range(len(blocks)), [block.keep for block in blocks])
tokens.set(title="tokens passed on", xlabel="block")
figure.savefig(folder / "blocks.png", bbox_inches="tight")

# %% What it still looks at, a row a picture: patches are painted over as blocks drop them.
scenes = [to_pil_image((image + 1) / 2) for image, _ in islice(DigitScenes("test"), 3)]
figure, axes = plt.subplots(figsize=(9, 6))
axes.imshow(lowpass.show_tokens(run.slim, scenes))
axes.axis("off")
figure.savefig(folder / "tokens.png", bbox_inches="tight")

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
