"""The cost of calls that compute next to nothing, and the share of it that is the crossing into C++."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from interformer_bench import quiet, timing, workloads
from interformer_bench.ops.table import TABLE
from interformer_bench.peers import OURS
from interformer_bench.peers.registry import candidates
from interformer_bench.run import PASSES, runner
from interformer_bench.workloads import Sizes
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import interformer_kernels
from interformer_kernels import _backend

# Limits: a tiny call over padded SDPA, and seconds of a crossing with eight tensors.
MAX_RATIO, MAX_BORDER = 2.0, 1e-6
OPS = tuple(name for name, op in TABLE.items() if op.attends and op.composed is None)
RUNNERS = (OURS, "padded SDPA", "SDPA alone, padded before")
_LENGTHS, _SIZES = (10, 11), Sizes(heads=4, head_size=16, queries=2)

# A row of the table: the call, its time, and its target with the verdict.
CostRow = tuple[str, str, str]


def tiny(op: str) -> dict[str, timing.TimedCall]:
    """Eager calls without gradients on two rows of ten tokens: ours, padded SDPA, SDPA on already padded tensors."""
    arguments = workloads.inputs(op, _LENGTHS, _SIZES, torch.float32)
    queries = max(_LENGTHS) if TABLE[op].packed_queries else _SIZES.queries
    q, k, v = (torch.randn(len(_LENGTHS), _SIZES.heads, n, _SIZES.head_size) for n in (queries, *[max(_LENGTHS)] * 2))
    mask = torch.ones(len(_LENGTHS), 1, 1, max(_LENGTHS), dtype=torch.bool)
    peers = candidates(op, compile_too=False)
    runs = {name: runner(op, peers[name], arguments, PASSES[0]) for name in RUNNERS[:2]}
    return {**runs, RUNNERS[2]: lambda: sdpa(q, k, v, attn_mask=mask)}


def border() -> tuple[int, timing.TimedCall] | None:
    """The number of tensors that cross into C++, and a call of the native module with nothing to compute.

    None without a native module.
    """
    native = _backend.native()
    if native is None:
        return None
    original, recorded = native.attention_forward, []

    def record(*arguments: Any) -> Any:
        recorded.append(arguments)
        return original(*arguments)

    x, offsets = [torch.empty(0, 4, 16) for _ in range(4)], [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    native.attention_forward = record  # type: ignore[attr-defined]
    try:
        # The long way of a call, on which the module gets the outputs, too.
        with torch.autograd.forward_ad.dual_level():
            interformer_kernels.jagged_attention(*x[:3], offsets[0], kv_offsets=offsets[1], gate=x[3], backend="cpu")
    finally:
        native.attention_forward = original  # type: ignore[attr-defined]
    return sum(isinstance(x, Tensor) for x in _flat(recorded[0])), lambda: original(*recorded[0])


def _flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for x in arguments:
        yield from _flat(x) if isinstance(x, tuple) else (x,)


def lines(seconds: float = 1.0) -> list[CostRow]:
    """The rows of the table, measured on one thread: there is no work for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_tiny_rows(seconds), *_border_rows(seconds)]
    finally:
        torch.set_num_threads(threads)


def without_ratios(rows: list[CostRow], busy: str | None) -> list[CostRow]:
    """The rows, without the ratios and verdicts of a busy machine."""
    return [(call, time, quiet.NO_RATIO if busy and target != "-" else target) for call, time, target in rows]


def _tiny_rows(seconds: float) -> list[CostRow]:
    rows = []
    for op in OPS:
        timings = timing.interleaved(tiny(op), seconds=seconds)
        ours, padded = timings[OURS].median, timings[RUNNERS[1]].median
        verdict = "pass" if ours <= MAX_RATIO * padded else "MISS"
        target = f"<= {MAX_RATIO:g}x padded SDPA: {ours / padded:.2f}x {verdict}"
        for name, time in timings.items():
            rows.append((f"{op}, 2 rows of 10: {name}", _microseconds(time.median), target if name == OURS else "-"))
    return rows


def _border_rows(seconds: float) -> list[CostRow]:
    crossing = border()
    if crossing is None:
        return []
    tensors, call = crossing
    time = timing.interleaved({"border": call}, seconds=seconds)["border"].median
    verdict = "pass" if time <= MAX_BORDER * tensors / 8 else "MISS"
    target = f"<= 1 us for 8 tensors: {time / tensors * 8e6:.2f} us {verdict}"
    return [(f"native call with {tensors} tensors, nothing to compute", _microseconds(time), target)]


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us"
