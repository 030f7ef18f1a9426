"""Tests of the CUDA kernels on the CPU; collected only under INTERFORMER_EMULATE=1 (`make cuda-test`).

They need a process of their own, since the emulation replaces the CUDA part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

EMULATES = os.environ.get("INTERFORMER_EMULATE", "") == "1"
collect_ignore_glob = [] if EMULATES else ["test_*"]

if EMULATES:
    import emulation

    MODULE = emulation.load()
    emulation.install(MODULE)


@pytest.fixture(autouse=True)
def emulated() -> Iterator[ModuleType]:
    """The emulation, with fibers in order and copies that land late unless a test configures it otherwise."""
    MODULE.configure(0, True)
    yield MODULE
    MODULE.configure(0, True)


@pytest.fixture
def tf32() -> Iterator[None]:
    """PyTorch allows TF32 in float32 matrix products."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
