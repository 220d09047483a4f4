"""Your own model and your own images, both in memory.

Shows:  a plain timm ViT that you have trained and two torch data sets of (image, label) are all that `compress` needs,
        without a name or a file. Here they are those of small_digits.py; put yours in their place.
Prints: top-1 and MACs of the dense model, of the slim one, and of the slim one fine-tuned; then a prediction.
Takes:  half a minute on two cores, without a network.
Run:    make .venv/.lowpass-ready && .venv/bin/python examples/your_own_model.py
"""

# %% A model, and images as it takes them. Transformers' and torchvision's ViTs will do as well.
import tempfile
from pathlib import Path

import torch
from small_digits import images, trained

import lowpass

train, test = images()
dense = trained()

# %% Half of the multiply-accumulates. The numbers of images are for this example; the defaults take thousands.
out = Path(tempfile.mkdtemp(prefix="lowpass-")) / "own"
run = lowpass.compress(dense, (train, test), out, target_macs=0.5, score_images=256, measure_images=256)
searched = run.metrics

# %% The dense model teaches the slim one for a while.
tuned = run.finetune(epochs=3)
for name, figures in (("dense", searched.dense), ("slim", searched.slim), ("slim, fine-tuned", tuned.slim)):
    print(f"{name}: top-1 {figures.top1:.1f}%, {figures.macs:,} MACs an image")

# %% The slim model is a torch module. It is kept in the run's folder, which `lowpass.Run(folder)` opens again.
image, label = test[0]
with torch.inference_mode():
    logits = lowpass.Run(out).slim(image[None])
print(f"a {label} is taken for a {logits.argmax().item()}; run directory: {out}")
