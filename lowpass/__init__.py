"""Take a trained vision transformer and ship it small and truly fast (VTC-LFC: Wang et al., NeurIPS 2022).

    import lowpass

    run = lowpass.compress("deit_small_patch16_224", "imagenet/", "runs/s", weights="deit_small.pth", target_macs=0.46)
    run.finetune()
    run.export("fp16")

Nothing heavy is imported before it is used, and nothing is printed: the log is `logging.getLogger("lowpass")`, progress
goes to the function given as `progress`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowpass.pipeline.base.privacy import send_nothing
from lowpass.pipeline.base.version import __version__

send_nothing()

if TYPE_CHECKING:
    from lowpass.api import Run, compress
    from lowpass.pipeline.base.errors import InputError, RunError
    from lowpass.pipeline.base.progress import Step
    from lowpass.pipeline.checkpoints.load import load_model
    from lowpass.pipeline.method.channels import ChannelChoice, choose_channels
    from lowpass.pipeline.method.energy import low_frequency_energy
    from lowpass.pipeline.method.frequency import lowpass_images
    from lowpass.pipeline.method.sensitivity import ChannelScores
    from lowpass.pipeline.method.token_scores import token_scores
    from lowpass.pipeline.model.slim_vit import SlimViT
    from lowpass.pipeline.run.show_tokens import show_tokens
    from lowpass.pipeline.search.channel_criteria import low_frequency_sensitivity

__all__ = [
    "ChannelChoice",
    "ChannelScores",
    "InputError",
    "Run",
    "RunError",
    "SlimViT",
    "Step",
    "__version__",
    "choose_channels",
    "compress",
    "load_model",
    "low_frequency_energy",
    "low_frequency_sensitivity",
    "lowpass_images",
    "show_tokens",
    "token_scores",
]

_HOMES = {
    "ChannelChoice": "pipeline.method.channels",
    "ChannelScores": "pipeline.method.sensitivity",
    "InputError": "pipeline.base.errors",
    "Run": "api",
    "RunError": "pipeline.base.errors",
    "SlimViT": "pipeline.model.slim_vit",
    "Step": "pipeline.base.progress",
    "choose_channels": "pipeline.method.channels",
    "compress": "api",
    "load_model": "pipeline.checkpoints.load",
    "low_frequency_energy": "pipeline.method.energy",
    "low_frequency_sensitivity": "pipeline.search.channel_criteria",
    "lowpass_images": "pipeline.method.frequency",
    "show_tokens": "pipeline.run.show_tokens",
    "token_scores": "pipeline.method.token_scores",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowpass' has no attribute {name!r}")
    value = getattr(import_module(f"lowpass.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
