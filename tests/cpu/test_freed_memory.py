"""`keep_freed_memory`: freed tensors' memory serves the next ones, without fresh pages."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytest.importorskip("interformer_kernels._C", exc_type=ImportError)

FAULTS = """
import resource, sys, torch
import interformer_kernels as ik
if sys.argv[1] == "keep":
    assert ik.keep_freed_memory() is True
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for x in [torch.empty(8 << 20) for _ in range(4)]:
        x.fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([step() for _ in range(10)][-1])  # blocks of the first steps are split until all find a place
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_freed_memory_is_kept() -> None:
    def faults(mode: str) -> int:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", FAULTS, mode]
        return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    given_back, kept = faults("give back"), faults("keep")
    assert given_back > 10 * max(kept, 1), (given_back, kept)
