"""The grid that parity tests walk: every case of every op, on every backend that this machine can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from every import EVERY

from interformer_kernels import _backend, testing

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The dtypes of the GPU backends, whose tests are slow without a GPU.
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Cases that take every path of the kernels.
_IN_ALL_DTYPES = {"plain", "gate and residual", "v is k", "interleaved, rope", "gelu, bias, residual"}
ALL_CASES = [case for op in testing.OPS for case in testing.cases(op)]


def backends(op: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[str]:
    """Names of the backends that can serve the op here; always at least the reference."""
    return [name for name in _backend.BACKENDS if _backend.unsupported_reason(op, name, device, dtype) is None]


def case_ids(cases: list[testing.Case]) -> list[str]:
    """Readable ids."""
    return [f"{case.op}-{case.name.replace(' ', '_')}" for case in cases]


def over_cases(cases: list[testing.Case] | None = None) -> pytest.MarkDecorator:
    """Parametrise a test over `(backend, case)`."""
    chosen = ALL_CASES if cases is None else cases
    pairs = [(backend, case) for case in chosen for backend in backends(case.op)]
    ids = [f"{backend}-{name}" for (backend, _), name in zip(pairs, case_ids([c for _, c in pairs]), strict=True)]
    return pytest.mark.parametrize(("backend", "case"), pairs, ids=ids)


def gpu_dtypes(turn: int, every: bool = EVERY) -> tuple[torch.dtype, ...]:
    """One dtype of GPUs by turns, or `every` one."""
    return GPU_DTYPES if every else (GPU_DTYPES[turn % len(GPU_DTYPES)],)


def in_turn(cases: list[testing.Case]) -> Iterator[tuple[testing.Case, torch.dtype, str]]:
    """Each case with a dtype of GPUs in rotation and an id; a few cases, and with EVERY=1 all, with each dtype."""
    for i, (case, name) in enumerate(zip(cases, case_ids(cases), strict=True)):
        for dtype in gpu_dtypes(i, EVERY or case.name in _IN_ALL_DTYPES):
            yield case, dtype, f"{name}-{str(dtype).removeprefix('torch.')}"
