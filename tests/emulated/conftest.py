"""Tests of the CUDA kernels on the CPU; collected only under INTERFORMER_EMULATE=1 (`make cuda-test`).

In a process of its own, since the emulation takes the place of the CUDA part.
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
    """The emulation, which runs fibers in order and lets copies land late, until a test says otherwise."""
    MODULE.configure(0, True)
    yield MODULE
    MODULE.configure(0, True)


@pytest.fixture
def tf32() -> Iterator[None]:
    """PyTorch allows its own matrix products to shorten float32."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
