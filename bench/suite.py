"""The tests of `bench_ops.py`: every named shape, runner and pass of an op under pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interformer_bench import checks, grid, run, shapes
from interformer_bench.grid import Shape
from interformer_bench.peers.registry import candidates


def _cases(op: str) -> list[Any]:
    parameters = []
    for shape in grid.shapes(shapes.length_distributions(), [op]):
        for name, peer in candidates(op).items():
            for direction in run.PASSES[: 2 if peer.trains else 1]:
                label = f"{shape.distribution.name}, {shape.sizes}-{name}-{direction}"
                parameters.append(pytest.param(shape, name, direction, id=label))
    return parameters


def suite(op: str) -> Callable[..., None]:
    """The test function of an op."""

    @pytest.mark.timeout(0)  # a bench may take longer than a test
    @pytest.mark.parametrize(("shape", "name", "direction"), _cases(op))
    def test(benchmark: Any, shape: Shape, name: str, direction: str) -> None:
        peer = candidates(op)[name]
        small = checks.small_lengths(shape.lengths(), shape.sizes.heads)
        verdict = checks.Checker(op, small, shape.sizes, torch.float32).check(name, peer)
        assert verdict.problem is None
        arguments = shape.inputs(torch.float32)
        reason = run.too_large(peer, arguments, direction)
        if reason is not None:
            pytest.skip(reason)
        benchmark.group = f"{shape.distribution.name}, {shape.sizes}, {direction}"
        benchmark(run.runner(op, peer, arguments, direction))

    test_function: Callable[..., None] = test
    return test_function
