"""`pytest bench/bench_pma_pooling.py`: PMA pooling and its peers under pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interformer_bench import peers, run, shapes

OP = "pma_pooling"
LAWS = shapes.laws()
pytestmark = pytest.mark.timeout(0)  # the limit of tests does not suit benches


@pytest.mark.parametrize("direction", run.PASSES)
@pytest.mark.parametrize("runner", peers.candidates(OP))
@pytest.mark.parametrize("law", ["movielens", "beauty", "uniform 1..50", "all 1024"])
def test_pma_pooling(benchmark: Any, law: str, runner: str, direction: str) -> None:
    shape = run.Shape(OP, LAWS[law], rows=256)
    peer = peers.candidates(OP)[runner]
    arguments = shape.inputs(torch.float32, "cpu")
    assert peers.check(OP, runner, arguments) is None
    benchmark.group = f"{law}, {direction}"
    benchmark(run.runner(OP, peer, arguments, direction))
