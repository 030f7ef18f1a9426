"""Large batches: a row's bits do not depend on the other rows, and every row is right wherever it lies.

Persistent blocks, their tile scheduler, the list of long rows, and rows split and combined all occur only in batches
that fill a GPU many times over.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from interformer_bench import checks
from interformer_bench.check_context import (
    DTYPES,
    CheckContext,
    Finding,
    Inputs,
    Results,
    dtype_name,
    eager_and_truth,
    random_lengths,
    same_bits,
    within_budget,
)

from interformer_kernels import testing

_ROWS, _SLICES, _ALONE = 65536, 16, 64
# Gradients that are sums over rows: a single row does not have them.
_SUMS = ("dseeds",)
# Peak memory of the definition of pooling with its gradients, in float64 tensors of the size of k.
_DEFINITION_TENSORS = 64


def lengths_of(tiny: bool) -> list[int]:
    """Many short rows, some of them empty, a few longer ones, and one of 5000 tokens in the middle."""
    if tiny:
        lengths = random_lengths(12, 0, 16)
        lengths[7] = 60
        return lengths
    lengths = random_lengths(_ROWS, 0, 32)
    for row, length in zip(range(1000, _ROWS, 4000), random_lengths(16, 200, 1500, seed=1), strict=False):
        lengths[row] = length
    lengths[40_001] = 5000
    return lengths


def large_batch(context: CheckContext) -> Iterator[Finding]:
    """The same bits twice, in slices, and row by row; and some rows against float64."""
    lengths = lengths_of(context.place.tiny)
    for gate in ("", "full") if context.spec.attends else ("",):
        case = context.case(lengths, kv_heads=2, gate=gate)
        for dtype in DTYPES:
            inputs = context.draw(case, dtype)
            whole = context.run(inputs)
            suffix = ", gated" if gate else ""
            yield same_bits(f"two runs{suffix}", dtype, context.run(inputs), whole, lengths)
            yield _in_slices(context, inputs, lengths, whole, suffix)
            rows = chosen_rows(lengths)
            yield _alone(context, inputs, lengths, whole, rows, suffix)
            yield _against_float64(context, inputs, lengths, whole, rows, suffix)
            if any(name in whole for name in _SUMS):
                yield _sums_against_float64(context, inputs, whole, suffix)


def chosen_rows(lengths: Sequence[int]) -> list[int]:
    """The first row, the last, the longest, and random ones."""
    count = min(_ALONE, len(lengths))
    longest = sorted(range(len(lengths)), key=lambda b: -lengths[b])[: count // 8]
    random_rows = random.Random(0).sample(range(len(lengths)), count)
    return sorted(list(dict.fromkeys([0, len(lengths) - 1, *longest, *random_rows]))[:count])


def _in_slices(context: CheckContext, inputs: Inputs, lengths: Sequence[int], whole: Results, suffix: str) -> Finding:
    """Every row, in slices of the batch that are one call each."""
    title, step = f"slices of the batch{suffix}", -(-len(lengths) // _SLICES)
    finding = Finding(title, dtype_name(inputs["grad_out"].dtype), True)
    for first in range(0, len(lengths), step):
        end = min(first + step, len(lengths))
        finding = _compared(title, context, inputs, lengths, whole, first, end)
        if not finding.ok:
            break
    return finding


def _alone(
    context: CheckContext, inputs: Inputs, lengths: Sequence[int], whole: Results, rows: Sequence[int], suffix: str
) -> Finding:
    """Single rows, one call each."""
    title = f"rows alone{suffix}"
    finding = Finding(title, dtype_name(inputs["grad_out"].dtype), True)
    for b in rows:
        finding = _compared(title, context, inputs, lengths, whole, b, b + 1)
        if not finding.ok:
            break
    return finding


def _compared(
    title: str, context: CheckContext, inputs: Inputs, lengths: Sequence[int], whole: Results, first: int, end: int
) -> Finding:
    """Rows `first .. end - 1` in a call of their own against the same rows of the whole batch."""
    alone = context.run(testing.alone(inputs, lengths, first, end))
    actual = {name: x for name, x in alone.items() if name not in _SUMS}
    expected = {name: testing.row_of(whole[name], lengths, first, end) for name in actual}
    finding = same_bits(title, inputs["grad_out"].dtype, actual, expected, lengths[first:end])
    if finding.ok or finding.row is None:
        return finding
    return Finding(**{**vars(finding), "row": first + finding.row})


def _against_float64(
    context: CheckContext, inputs: Inputs, lengths: Sequence[int], whole: Results, rows: Sequence[int], suffix: str
) -> Finding:
    """Rows of the whole batch against float64; sums over rows come from a call on these rows."""
    not_empty = [b for b in rows if lengths[b]]
    sampled = checks.call_on_rows(inputs, lengths, not_empty)
    eager, truth = eager_and_truth(context.op, sampled)
    actual = {name: checks.select_rows(x, lengths, not_empty) for name, x in whole.items() if name not in _SUMS}
    sums = {name: x for name, x in context.run(sampled).items() if name in _SUMS}
    title = f"{len(not_empty)} rows against float64{suffix}"
    return within_budget(title, inputs["grad_out"].dtype, {**actual, **sums}, eager, truth)


def _sums_against_float64(context: CheckContext, inputs: Inputs, whole: Results, suffix: str) -> Finding:
    """Sums over all rows of the batch against float64, where memory suffices for the definition of the whole batch."""
    title, dtype = f"sums over rows against float64{suffix}", inputs["grad_out"].dtype
    needed, free = _DEFINITION_TENSORS * 8 * inputs["k"].numel(), context.place.free_bytes()
    if needed > free:
        problem = f"needs {needed / 2**30:.0f} GiB of memory, found {free / 2**30:.0f} free"
        return Finding(title, dtype_name(dtype), None, problem)
    eager, truth = eager_and_truth(context.op, inputs)
    return within_budget(title, dtype, {name: whole[name] for name in _SUMS}, eager, truth)


# ---------------------------------------------------------------- beyond 2^31 numbers

# Tokens of a row, heads and channels of q, k or x, and rows that are compared at each end.
_LENGTH, _HEADS, _CHANNELS, _END_ROWS = 128, 16, 128, 4


def beyond_int32(context: CheckContext) -> Iterator[Finding]:
    """Tensors of more than 2^31 numbers: rows at both ends have the same bits in a call of their own."""
    dtype = torch.bfloat16
    length = 8 if context.place.tiny else _LENGTH
    heads, channels = (2, 16) if context.place.tiny else (_HEADS, _CHANNELS)
    width = heads * channels if context.spec.has_heads else channels
    rows = 12 if context.place.tiny else 2**31 // (length * width) + 2 * _END_ROWS
    # The tensors that a call and its gradients hold at once, some of them in float32, and the numbers drawn for it.
    needed, free = 16 * rows * length * width * dtype.itemsize, context.place.free_bytes()
    if needed > free:
        problem = f"needs {needed / 2**30:.0f} GiB of memory, found {free / 2**30:.0f} free"
        yield Finding("rows at both ends", dtype_name(dtype), None, problem)
        return
    lengths = [length] * rows
    sizes = {"heads": heads, "kv_heads": heads, "head_size": channels, "value_size": channels, "queries": 2}
    inputs = context.draw(context.case(lengths, **sizes), dtype)
    whole = context.run(inputs)
    for first in (0, rows - _END_ROWS):
        finding = _compared("rows at both ends", context, inputs, lengths, whole, first, first + _END_ROWS)
        if not finding.ok:
            break
    yield finding
