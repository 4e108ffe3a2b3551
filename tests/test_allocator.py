"""Memory that a step frees is there for the next one."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
from topkd._runtime.allocator import keep_freed_memory
if {keep}: keep_freed_memory()
def step():
    held = [bytes(bytearray(3 << 20)) for _ in range(30)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it sets the allocator of glibc")
def test_steps_ask_the_kernel_for_few_new_pages():
    faults = [
        int(subprocess.check_output([sys.executable, "-c", STEPS.format(keep=keep)]))
        for keep in (False, True)
    ]
    assert faults[1] < faults[0] / 10
