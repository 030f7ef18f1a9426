"""`pytest bench/bench_model.py`: whole models, packed and padded, under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest
from interformer_bench import shapes
from interformer_bench.model import contenders
from interformer_bench.model.cases import Case, cases
from interformer_bench.model.measure import wrong

_CASES = cases(shapes.laws())


@pytest.mark.timeout(0)  # the limit of tests does not suit benches
@pytest.mark.parametrize("case", _CASES, ids=[case.name for case in _CASES])
@pytest.mark.parametrize("name", contenders.contenders(compile_too=True))
def test_model(benchmark: Any, case: Case, name: str) -> None:
    reason = contenders.why_not(name, case)
    if reason is not None:
        pytest.skip(reason)
    assert wrong(name, case.lengths()) is None
    benchmark.group = case.name
    benchmark(contenders.runner(contenders.make(name, case.batch()), case.direction))
