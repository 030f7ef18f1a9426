"""Large batches: a row's bits do not depend on the other rows, and rows are right wherever they lie.

Persistent blocks, their queue, the list of long rows, rows cut into chunks and joined: only batches that fill a GPU
many times over have all of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from interformer_bench import checks
from interformer_bench.check_ground import (
    DTYPES,
    Finding,
    Ground,
    Inputs,
    Results,
    by_definition,
    drawn,
    name_of,
    same_bits,
    within_budget,
)

from interformer_kernels import testing

_ROWS, _SLICES, _ALONE = 65536, 16, 64
# Sums over rows and tokens: no row has them alone.
_SUMS = ("dseeds",)
# So many tensors as large as k, in float64, is the most that the definition of pooling holds at once, gradients too.
_DEFINITION = 64


def lengths_of(tiny: bool) -> list[int]:
    """Many short rows, empty ones among them, some longer, and one of 5000 in the middle."""
    if tiny:
        found = drawn(12, 0, 16)
        found[7] = 60
        return found
    found = drawn(_ROWS, 0, 32)
    for place, length in zip(range(1000, _ROWS, 4000), drawn(16, 200, 1500, seed=1), strict=False):
        found[place] = length
    found[40_001] = 5000
    return found


def large_batch(ground: Ground) -> Iterator[Finding]:
    """Twice, in slices, and row by row: the same bits; and some rows against float64."""
    lengths = lengths_of(ground.place.tiny)
    for gate in ("", "full") if ground.op in testing.OPS[:3] else ("",):
        case = ground.case(lengths, kv_heads=2, gate=gate)
        for dtype in DTYPES:
            inputs = ground.draw(case, dtype)
            whole = ground.run(inputs)
            mark = ", gated" if gate else ""
            yield same_bits(f"two runs{mark}", dtype, ground.run(inputs), whole, lengths)
            yield _in_slices(ground, inputs, lengths, whole, mark)
            rows = chosen_rows(lengths)
            yield _alone(ground, inputs, lengths, whole, rows, mark)
            yield _exact(ground, inputs, lengths, whole, rows, mark)
            if any(name in whole for name in _SUMS):
                yield _exact_sums(ground, inputs, whole, mark)


def chosen_rows(lengths: Sequence[int]) -> list[int]:
    """The first, the last, the longest, and random ones."""
    count = min(_ALONE, len(lengths))
    longest = sorted(range(len(lengths)), key=lambda b: -lengths[b])[: count // 8]
    drawn_rows = random.Random(0).sample(range(len(lengths)), count)
    return sorted(list(dict.fromkeys([0, len(lengths) - 1, *longest, *drawn_rows]))[:count])


def _in_slices(ground: Ground, inputs: Inputs, lengths: Sequence[int], whole: Results, mark: str) -> Finding:
    """Every row: the batch in slices, each a call of its own."""
    what, step = f"slices of the batch{mark}", -(-len(lengths) // _SLICES)
    finding = Finding(what, name_of(inputs["grad_out"].dtype), True)
    for first in range(0, len(lengths), step):
        end = min(first + step, len(lengths))
        finding = _compared(what, ground, inputs, lengths, whole, first, end)
        if not finding.ok:
            break
    return finding


def _alone(
    ground: Ground, inputs: Inputs, lengths: Sequence[int], whole: Results, rows: Sequence[int], mark: str
) -> Finding:
    """Single rows, each a call of its own."""
    what = f"rows alone{mark}"
    finding = Finding(what, name_of(inputs["grad_out"].dtype), True)
    for b in rows:
        finding = _compared(what, ground, inputs, lengths, whole, b, b + 1)
        if not finding.ok:
            break
    return finding


def _compared(
    what: str, ground: Ground, inputs: Inputs, lengths: Sequence[int], whole: Results, first: int, end: int
) -> Finding:
    """Rows `first .. end - 1` by themselves against what the whole batch made of them."""
    alone = ground.run(testing.alone(inputs, lengths, first, end))
    found = {name: x for name, x in alone.items() if name not in _SUMS}
    wanted = {name: testing.row_of(whole[name], lengths, first, end) for name in found}
    finding = same_bits(what, inputs["grad_out"].dtype, found, wanted, lengths[first:end])
    if finding.ok or finding.row is None:
        return finding
    return Finding(**{**vars(finding), "row": first + finding.row})


def _exact(
    ground: Ground, inputs: Inputs, lengths: Sequence[int], whole: Results, rows: Sequence[int], mark: str
) -> Finding:
    """Rows of the whole batch against float64; sums over rows are those of a call on these rows."""
    held = [b for b in rows if lengths[b]]
    few = checks.cut(inputs, lengths, held)
    eager, truth = by_definition(ground.op, few)
    found = {name: checks.of_rows(x, lengths, held) for name, x in whole.items() if name not in _SUMS}
    sums = {name: x for name, x in ground.run(few).items() if name in _SUMS}
    what = f"{len(held)} rows against float64{mark}"
    return within_budget(what, inputs["grad_out"].dtype, {**found, **sums}, eager, truth)


def _exact_sums(ground: Ground, inputs: Inputs, whole: Results, mark: str) -> Finding:
    """Sums over all rows of the batch against float64, where there is memory for the definition of all of it."""
    what, dtype = f"sums over rows against float64{mark}", inputs["grad_out"].dtype
    needed, free = _DEFINITION * 8 * inputs["k"].numel(), ground.place.free_bytes()
    if needed > free:
        problem = f"needs {needed / 2**30:.0f} GiB of memory, found {free / 2**30:.0f} free"
        return Finding(what, name_of(dtype), None, problem)
    eager, truth = by_definition(ground.op, inputs)
    return within_budget(what, dtype, {name: whole[name] for name in _SUMS}, eager, truth)


# ---------------------------------------------------------------- beyond 2^31 numbers

# Rows of so many tokens, and what a token has of q, k or x: heads and channels.
_LENGTH, _HEADS, _CHANNELS, _FAR = 128, 16, 128, 4


def beyond_int32(ground: Ground) -> Iterator[Finding]:
    """Tensors of more than 2^31 numbers: rows at both ends have the bits that they have in a call of their own."""
    dtype = torch.bfloat16
    length = 8 if ground.place.tiny else _LENGTH
    heads, channels = (2, 16) if ground.place.tiny else (_HEADS, _CHANNELS)
    width = channels if ground.op == "personalized_ffn" else heads * channels
    rows = 12 if ground.place.tiny else 2**31 // (length * width) + 2 * _FAR
    # As many tensors as a call and its gradients have at once, some of them in float32, and the numbers drawn.
    needed, free = 16 * rows * length * width * dtype.itemsize, ground.place.free_bytes()
    if needed > free:
        problem = f"needs {needed / 2**30:.0f} GiB of memory, found {free / 2**30:.0f} free"
        yield Finding("rows at both ends", name_of(dtype), None, problem)
        return
    lengths = [length] * rows
    sizes = {"heads": heads, "kv_heads": heads, "head_size": channels, "value_size": channels, "queries": 2}
    inputs = ground.draw(ground.case(lengths, **sizes), dtype)
    whole = ground.run(inputs)
    for first in (0, rows - _FAR):
        finding = _compared("rows at both ends", ground, inputs, lengths, whole, first, first + _FAR)
        if not finding.ok:
            break
    yield finding
