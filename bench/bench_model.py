"""`pytest bench/bench_model.py`: whole models, packed and padded, under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest
from interformer_bench import shapes
from interformer_bench.model import contenders
from interformer_bench.model.cases import Case, cases
from interformer_bench.model.measure import wrong

from interformer_kernels import keep_freed_memory

_CASES = cases(shapes.length_distributions())


@pytest.mark.timeout(0)  # a bench may take longer than a test
@pytest.mark.parametrize("case", _CASES, ids=[case.name for case in _CASES])
@pytest.mark.parametrize("name", contenders.contenders(compile_too=True))
def test_model(benchmark: Any, case: Case, name: str) -> None:
    reason = contenders.unsupported_reason(name, case)
    if reason is not None:
        pytest.skip(reason)
    assert wrong(name, case.lengths()) is None
    keep_freed_memory()
    benchmark.group = case.name
    benchmark(contenders.runner(contenders.make(name, case.batch()), case.direction))
