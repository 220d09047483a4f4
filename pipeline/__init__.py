"""lowpass: compress a trained DeiT by the low-frequency criteria of VTC-LFC (Wang et al., NeurIPS 2022)."""

__version__ = "0.1.0"
