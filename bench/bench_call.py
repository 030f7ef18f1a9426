"""`pytest bench/bench_call.py`: the cost of calls that compute next to nothing, under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest
from interformer_bench import calls

pytestmark = pytest.mark.timeout(0)


@pytest.mark.parametrize("op", calls.OPS)
@pytest.mark.parametrize("name", calls.RUNNERS)
def test_tiny_call(benchmark: Any, op: str, name: str) -> None:
    benchmark.group = op
    benchmark(calls.tiny(op)[name])


def test_border(benchmark: Any) -> None:
    crossing = calls.border()
    if crossing is None:
        pytest.skip("the native module is not there")
    tensors, call = crossing
    benchmark.extra_info["tensors"] = tensors
    benchmark(call)
