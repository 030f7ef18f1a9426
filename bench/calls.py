"""What a call costs where there is next to nothing to compute, and what the border to C++ has of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from interformer_bench import timing, workloads
from interformer_bench.peers import OURS, candidates
from interformer_bench.run import PASSES, runner
from interformer_bench.workloads import Sizes
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import interformer_kernels
from interformer_kernels import _backend

# Of a tiny call, over padded SDPA's; and seconds of the border for eight tensors.
MOST_RATIO, MOST_BORDER = 2.0, 1e-6
OPS = ("jagged_attention", "pma_pooling", "gated_cross_attention")
RUNNERS = (OURS, "padded SDPA", "SDPA alone, padded before")
_LENGTHS, _SIZES = (10, 11), Sizes(heads=4, head_size=16, queries=2)

Line = tuple[str, str, str]


def tiny(op: str) -> dict[str, timing.Run]:
    """Eager calls without gradients on two rows of ten tokens: ours, padded SDPA, SDPA on what is padded already."""
    arguments = workloads.inputs(op, _LENGTHS, _SIZES, torch.float32)
    queries = max(_LENGTHS) if op == "jagged_attention" else _SIZES.queries
    q, k, v = (torch.randn(len(_LENGTHS), _SIZES.heads, n, _SIZES.head_size) for n in (queries, *[max(_LENGTHS)] * 2))
    held = torch.ones(len(_LENGTHS), 1, 1, max(_LENGTHS), dtype=torch.bool)
    found = candidates(op, compile_too=False)
    runs = {name: runner(op, found[name], arguments, PASSES[0]) for name in RUNNERS[:2]}
    return {**runs, RUNNERS[2]: lambda: sdpa(q, k, v, attn_mask=held)}


def border() -> tuple[int, timing.Run] | None:
    """A call of the native module with nothing to compute, and how many tensors cross; None where it is not there."""
    native = _backend.native()
    if native is None:
        return None
    whole, caught = native.attention_forward, []

    def catch(*arguments: Any) -> Any:
        caught.append(arguments)
        return whole(*arguments)

    empty, offsets = torch.empty(0, 4, 16), torch.zeros(1, dtype=torch.int64)
    native.attention_forward = catch  # type: ignore[attr-defined]
    try:
        interformer_kernels.jagged_attention(
            empty, empty.clone(), empty.clone(), offsets, kv_offsets=offsets.clone(), gate=empty.clone(), backend="cpu"
        )
    finally:
        native.attention_forward = whole  # type: ignore[attr-defined]
    return sum(isinstance(x, Tensor) for x in _flat(caught[0])), lambda: whole(*caught[0])


def _flat(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for x in arguments:
        yield from _flat(x) if isinstance(x, tuple) else (x,)


def lines(seconds: float = 1.0) -> list[Line]:
    """The table: what, the time found, and the target with its verdict; on one thread, there is no work for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*_tiny_lines(seconds), *_border_lines(seconds)]
    finally:
        torch.set_num_threads(threads)


def _tiny_lines(seconds: float) -> list[Line]:
    found = []
    for op in OPS:
        taken = timing.interleaved(tiny(op), seconds=seconds)
        ours, padded = taken[OURS].median, taken[RUNNERS[1]].median
        verdict = "pass" if ours <= MOST_RATIO * padded else "MISS"
        target = f"<= {MOST_RATIO:g}x padded SDPA: {ours / padded:.2f}x {verdict}"
        for name, timed in taken.items():
            found.append((f"{op}, 2 rows of 10: {name}", _microseconds(timed.median), target if name == OURS else "-"))
    return found


def _border_lines(seconds: float) -> list[Line]:
    call = border()
    if call is None:
        return []
    tensors, run = call
    time = timing.interleaved({"border": run}, seconds=seconds)["border"].median
    verdict = "pass" if time <= MOST_BORDER * tensors / 8 else "MISS"
    target = f"<= 1 us for 8 tensors: {time / tensors * 8e6:.2f} us {verdict}"
    return [(f"native call with {tensors} tensors, nothing to compute", _microseconds(time), target)]


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us"
