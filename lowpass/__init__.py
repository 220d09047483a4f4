"""Take a trained vision transformer and ship it small and truly fast."""

from lowpass.pipeline.base.version import __version__

__all__ = ["__version__"]
