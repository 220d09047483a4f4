"""What stands for your own model and images in these examples: 1,797 scans of digits, and a ViT that has learned them.

The scans come with scikit-learn, 8x8 pixels in grey. The ViT is timm's, of 16 tokens and 150,000 parameters, and learns
in some seconds on a CPU. Imported by the examples beside it; there is nothing to run here.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

TEST = 500  # of the scans
BATCH = 32


def scans() -> tuple[np.ndarray, np.ndarray]:
    """Ink in 0..1 as [1797, 8, 8], and which digit it is, in an order that mixes the writers. The last `TEST` are for
    testing."""
    ink, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return ink[order].reshape(-1, 8, 8).astype(np.float32) / 16, labels[order]


def images() -> tuple[TensorDataset, TensorDataset]:
    """For training and for testing: (image [1, 8, 8] as the model takes it, label)."""
    ink, labels = (torch.from_numpy(values) for values in scans())
    prepared = (ink[:, None] - 0.5) / 0.5
    return TensorDataset(prepared[:-TEST], labels[:-TEST]), TensorDataset(prepared[-TEST:], labels[-TEST:])


def trained() -> VisionTransformer:
    """A dense model of these images; the same one each time."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=3, num_heads=2)
    learn(model, *images()[0].tensors)
    return model


def learn(model: nn.Module, prepared: Tensor, labels: Tensor, epochs: int = 18) -> None:
    """Train a classifier of images [B, C, H, W], of timm or Transformers."""
    steps = epochs * len(torch.arange(len(labels)).split(BATCH))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(BATCH):
            answer = model(prepared[rows])
            optimizer.zero_grad()
            cross_entropy(getattr(answer, "logits", answer), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
