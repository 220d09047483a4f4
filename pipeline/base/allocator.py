"""glibc's allocator, told to keep what is freed: activations of some megabytes are otherwise mapped and unmapped by
every operation. On a virtual machine, where fresh pages are dear, that was a third to a half of a forward pass."""

import ctypes
import sys

# Parameters of mallopt(3), and what they are set to, in bytes.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
KEPT = {TRIM_THRESHOLD: 2**30, TOP_PAD: 2**26, MMAP_THRESHOLD: 2**25}


def keep_freed_memory() -> None:
    """For this process, where it runs on glibc; elsewhere nothing happens."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for parameter, value in KEPT.items():
        if mallopt is not None:
            mallopt(parameter, value)
