"""What is freed is used again: an allocation touches few fresh pages once one like it was freed."""

import platform
import subprocess
import sys

import pytest

# Every tensor is larger than all before it, so that glibc, left alone, maps each anew. Tensors of one size it maps or
# keeps by where the heap's other blocks happen to lie: that differs from process to process, and says nothing.
CODE = """
import resource, sys
import torch
from lowpass.pipeline.base.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
torch.set_num_threads(1)
torch.ones(5 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(20):
    torch.ones(6 * 2**20 + step * 2**14)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is nothing to tell other allocators")
def test_freed_memory_is_kept() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") < faults("leave") / 2
