"""The processes that train together: as `torchrun` and `accelerate launch` start them."""

import os

import torch
from accelerate import PartialState

from lowpass.pipeline.base.errors import RunError


def started_together() -> int:
    """How many processes there are by the launcher's word."""
    return int(os.environ.get("WORLD_SIZE", 1))


def on_cpus() -> bool:
    """Whether several processes share the CPUs. accelerate must be told: without a GPU it would take each to be alone,
    and each would train on everything."""
    return started_together() > 1 and not torch.cuda.is_available()


def processes() -> PartialState:
    """This process among them.

    Raises:
        RunError: they do not find each other.
    """
    state = PartialState(cpu=on_cpus())
    if state.num_processes != started_together():
        raise RunError(f"{started_together()} processes were started, but {state.num_processes} train together")
    return state
