"""The grid that parity tests walk: every case of every op, on every backend that this machine can run."""

from __future__ import annotations

import pytest
import torch

from interformer_kernels import _backend, testing

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
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
