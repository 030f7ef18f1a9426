"""Launches that are listed instead of run, for tools that judge machine code."""

from __future__ import annotations

from types import ModuleType

import torch
from memory import names_of

import interformer_kernels as ik


def test_listed_launches_are_not_run(emulated: ModuleType) -> None:
    """A persistent launch has as many blocks as the device holds, and its lists are made before it."""
    q, offsets = torch.randn(4 * 100, 2, 16), torch.arange(0, 401, 100)
    emulated.configure(0, True, resident=3)
    emulated.list_launches(True)
    try:
        half = q.bfloat16()
        out = ik.jagged_attention(half, half, half, offsets, backend="cuda")
        listed = emulated.launches()
    finally:
        emulated.list_launches(False)
    assert out.isnan().all()  # as it was allocated
    names = [names_of(str(emulated.__file__))[kernel] for kernel, *_ in listed]
    assert names == ["list_long_rows", "attend<BFloat16, 16>"]
    (_, blocks, threads, shared, arguments) = listed[1]
    assert (blocks, threads) == (3, 128)
    assert 0 < shared <= 101376
    assert offsets.data_ptr().to_bytes(8, "little") in arguments
    assert half.data_ptr().to_bytes(8, "little") in arguments
    assert not emulated.launches()
    again = ik.jagged_attention(half, half, half, offsets, backend="cuda")
    assert again.isfinite().all()
