"""What the launcher says of this process among those that it started, `torchrun` or `accelerate launch`."""

import os


def started_together() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number among them, from 0."""
    return int(os.environ.get("RANK", 0)) if started_together() > 1 else 0


def is_first() -> bool:
    """Whether this is the one that writes and answers."""
    return rank() == 0
