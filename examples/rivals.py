"""Rivals on your data: what else channels and tokens can be ranked by, in the same search at equal MACs.

Shows:  `channel_criterion`, `token_criterion` and `recovery`: whether the default is best for your model and images is
        measured, not taken on trust.
Prints: top-1 by criterion, before any training. With 500 test images a difference below 2 points says little.
Takes:  a minute on two cores, without a network.
Run:    make .venv/.lowpass-ready && .venv/bin/python examples/rivals.py
"""

# %% A dense model and images: put yours in their place.
import tempfile
from pathlib import Path

from small_digits import images, trained

import lowpass

dense, data = trained(), images()
folder = Path(tempfile.mkdtemp(prefix="lowpass-"))


def top1(name: str, **settings: object) -> float | None:
    """Of a slim model with 0.3 of the MACs, searched as told."""
    run = lowpass.compress(
        dense, data, folder / name, target_macs=0.3, score_images=256, measure_images=256, **settings
    )
    return run.metrics.slim.top1


# %% Channels: the default, the paper's, and three others; with the refit that makes up for what is cut, and without.
print(f"{'channels by':<16}{'with recovery':>15}{'without':>10}")
for criterion in ("obs", "lfs", "taylor", "magnitude", "random"):
    with_it = top1(criterion, channel_criterion=criterion)
    without = top1(f"{criterion}-alone", channel_criterion=criterion, recovery=False)
    print(f"{criterion:<16}{with_it:>14.1f}%{without:>9.1f}%")

# %% Tokens: low-frequency energy and attention, each alone, and by chance.
print(f"{'tokens by':<16}{'with recovery':>15}")
for criterion in ("lfe-attention", "attention", "lfe", "random"):
    print(f"{criterion:<16}{top1(f'tokens-{criterion}', token_criterion=criterion):>14.1f}%")
print(f"run directories: {folder}")
