"""Shares of a model's time by the kind of work, from PyTorch's profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from interformer_bench.model.cases import CONFIG, Case
from interformer_bench.model.contenders import make, runner
from torch.profiler import ProfilerActivity, profile

COLUMNS = ("lengths", "rows", "pass", "model", "work", "time", "share")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkl::_mkl_linear")
# Kinds of work by parts of an event's name; the first match counts.
_KINDS = {
    "kernels": ("interformer_kernels::",),
    "SDPA": ("scaled_dot_product", "_flash_attention"),
    "embedding": ("embedding", "aten::index_select", "aten::scatter_add", "aten::index_add"),
    "optimiser": ("_fused_adam",),
    "layer norm": ("layer_norm",),
    "copies": ("aten::cat", "aten::copy_", "aten::index_copy", "aten::fill_", "aten::zero_", "aten::stack"),
    "elementwise and sums": ("add", "mul", "sub", "silu", "tanh", "where", "sum", "exp", "sigmoid", "neg", "mean"),
}
# Everything that is no arithmetic: views, allocations, dispatch, Python.
BETWEEN = "between the ops"


def shares(case: Case, contender: str, calls: int = 5) -> dict[str, float]:
    """Seconds of a call by kind of work, the largest first: `_KINDS`, products over tokens or over rows, the rest."""
    batch = case.batch()
    call, tokens = runner(make(contender, batch), case.direction), batch.sequences.shape[0]
    over_tokens = {tokens, tokens + case.rows * CONFIG.num_cls}
    call()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wall = (time.perf_counter() - start) / calls
    seconds: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages(group_by_input_shape=True):
        kind = _kind(event, over_tokens)
        if kind is not None:
            seconds[kind] += event.self_cpu_time_total * 1e-6 / calls
    seconds[BETWEEN] = max(0.0, wall - sum(seconds.values()))
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _kind(event: Any, over_tokens: set[int]) -> str | None:
    if event.key in _PRODUCTS:
        sizes = {size for shape in event.input_shapes for size in shape}
        return "products over tokens" if sizes & over_tokens else "products over rows"
    return next((kind for kind, marks in _KINDS.items() if any(mark in event.key for mark in marks)), None)


def table(case: Case, contender: str) -> list[tuple[str, ...]]:
    """Rows of the table, in the order of `COLUMNS`."""
    by_kind = shares(case, contender)
    whole = sum(by_kind.values())
    cells = case.distribution.name, str(case.rows), case.direction, contender
    return [(*cells, kind, f"{time * 1e3:.2f} ms", f"{time / whole:.0%}") for kind, time in by_kind.items()]
