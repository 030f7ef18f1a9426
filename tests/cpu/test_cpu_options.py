"""Options of attention on the CPU where the shared cases are too small or too tame: bins of times, long rows, sinks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interformer_kernels import jagged_attention

pytest.importorskip("interformer_kernels._C", exc_type=ImportError)

LARGEST = torch.iinfo(torch.int64).max


def compare(lengths: list[int], dtype: torch.dtype = torch.float64, **options: Any) -> None:
    """Outputs and gradients of the CPU's kernels and of the reference, which in float64 are as good as exact."""
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v, grad = torch.randn(4, sum(lengths), 2, 8, dtype=dtype, generator=generator)
    results: list[tuple[Tensor, ...]] = []
    for backend in ("cpu", "reference"):
        leaves = {
            name: x.detach().clone().requires_grad_()
            for name, x in {"q": q, "k": k, "v": v, **options}.items()
            if isinstance(x, Tensor) and x.is_floating_point()
        }
        out, lse = jagged_attention(**{**options, **leaves}, offsets=offsets, return_lse=True, backend=backend)
        results.append((out, lse, *torch.autograd.grad(out, list(leaves.values()), grad)))
    # In float64 tighter than 1e-7, which assert_close takes by itself.
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize(
    "edges",
    [
        [],
        [5],
        [-3, 0, 0, 1, 1, 1, 2],
        [3] * 20,
        list(range(0, 400, 2)),
        [2**53 - 1, 2**53, 2**53 + 1, 2**53 + 2, LARGEST - 4096, LARGEST - 1, LARGEST],
        [int(1.2**i) for i in range(230)],
        [int(1.4**i) for i in range(63)],
        [int(1.4**i) for i in range(64)],
        [2**31 - 4, 2**31 - 2],
        [2**31 - 2, 2**31 - 1],
    ],
    ids=["none", "one", "small", "equal", "even", "huge", "logarithmic", "63", "64", "32 bits", "more than 32 bits"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_bins_of_times_are_those_of_a_search(edges: list[int], dtype: torch.dtype) -> None:
    """Differences at, before and behind every edge, and those that wrap; vectors of float32 have ways of their own."""
    near = [0, 1, 7, 2**31, 2**31 + 1, 2**32, LARGEST, *(edge + step for edge in edges[:60] for step in (-1, 0, 1))]
    times = torch.tensor([-LARGEST - 1, *(min(max(time, 0), LARGEST) for time in near)])
    table = torch.randn(2, len(edges) + 1, dtype=dtype, generator=torch.Generator().manual_seed(1))
    time_edges = torch.tensor(edges, dtype=torch.int64)
    compare([len(times)], dtype, time_bias=table, times=times, time_edges=time_edges)


def test_bias_of_a_row_whose_bins_are_not_kept() -> None:
    times = torch.arange(1100) * 7
    table = torch.randn(2, 2 * 600 + 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    edges = 2 ** torch.arange(8)
    compare(
        [1090, 10], causal=True, window=(200, -1), position_bias=table[:, :-8].contiguous(),
        time_bias=table[:, :9].contiguous(), times=times, time_edges=edges,
    )  # fmt: skip


def test_a_sink_of_minus_infinity_is_none() -> None:
    lengths, offsets = [9, 1, 0, 3], torch.tensor([0, 9, 10, 10, 13])
    q, k, v = torch.randn(3, sum(lengths), 2, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"causal": True, "window": (2, 0), "return_lse": True, "backend": "cpu"}
    with_sinks = jagged_attention(q, k, v, offsets, sinks=torch.full((2,), -torch.inf), **options)
    for found, expected in zip(with_sinks, jagged_attention(q, k, v, offsets, **options), strict=True):
        torch.testing.assert_close(found, expected)
