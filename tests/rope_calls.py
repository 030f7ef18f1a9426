"""Rotary embedding inside attention's kernels: calls and checks that the tests of both GPU backends share.

Each check takes a backend's `results(op, inputs)`: output, log-sum-exp and gradients, by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from grid import GPU_DTYPES
from guards import guarded, guarded_inputs
from torch import Tensor

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels.testing import Case, offsets_of

Results = Callable[[str, dict[str, Any]], dict[str, Tensor]]

ATTENTION = "jagged_attention"
# Rows of short kernels and of long ones, over several tiles; empty rows, and a tail.
LENGTHS = (40, 3, 0, 17)


def rope_case(name: str, **fields: Any) -> Case:
    return Case(ATTENTION, name, **{"lengths": LENGTHS, "heads": 2, "kv_heads": 1, **fields})


F32, BF16, F16 = GPU_DTYPES
# The last one is rotated in a pass of its own.
CASES = [
    (rope_case("all channels", rope=16), F32),
    (rope_case("interleaved", rope=16, options={"rope_interleaved": True}), BF16),
    (rope_case("few of many channels", rope=8, head_size=20, positions=True), F16),
    (rope_case("few of many channels, interleaved", rope=8, head_size=20, options={"rope_interleaved": True}), F32),
    (rope_case("no power of two", rope=24, head_size=24, options={"causal": True}), BF16),
    (rope_case("some of no power of two", rope=24, head_size=31, positions=True,
           options={"window": (20, 3), "num_prefix": 1}), F32),
    (rope_case("cross, gated", rope=8, query_lengths=(5, 40, 3, 33), positions=True, gate="full", residual=True), BF16),
    (rope_case("silu", rope=16, options={"score": "silu", "post_scale": 0.5}), F32),
    (rope_case("negative scale", rope=16, options={"scale": -0.3}), BF16),
    (rope_case("a pair of its own", rope=2, head_size=4), F16),
]  # fmt: skip


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return testing.make_inputs(rope_case("", rope=8, positions=True), dtype)


def check_positions_outside_of_the_tables(results: Results) -> None:
    ik.set_validation("off")
    inputs = _inputs()
    rows, tokens = inputs["rope"][0].shape[0], inputs["rope_positions"].shape[0]
    limits = torch.iinfo(torch.int64)
    outside = torch.tensor([limits.min, -1, 0, rows - 1, rows, limits.max]).repeat(tokens)[:tokens]
    clamped = results(ATTENTION, {**inputs, "rope_positions": outside.clamp(0, rows - 1)})
    for quantity, x in results(ATTENTION, {**inputs, "rope_positions": guarded(outside)}).items():
        assert torch.equal(x, clamped[quantity]), quantity


def check_rows_longer_than_the_tables(results: Results) -> None:
    ik.set_validation("off")
    inputs = _inputs()
    inputs["rope"] = tuple(guarded(table[:20].clone()) for table in inputs["rope"])
    positions = torch.cat([torch.arange(n) for n in (*LENGTHS, len(inputs["k"]) - sum(LENGTHS))])
    clamped = results(ATTENTION, {**inputs, "rope_positions": positions.clamp(max=19)})
    for quantity, x in results(ATTENTION, {**inputs, "rope_positions": None}).items():
        assert torch.equal(x, clamped[quantity]), quantity


def check_tables_and_positions_of_any_strides(results: Results, dtype: torch.dtype) -> None:
    """Both tables as columns of one, rows that begin anywhere, and strides that differ."""
    inputs = _inputs(dtype)
    plain = results(ATTENTION, inputs)
    cos, sin = inputs["rope"]
    beside = torch.cat((cos, sin), 1).split(cos.shape[1], 1)
    odd = torch.cat((cos, sin, sin[:, :1]), 1)
    tables = [beside, (odd[:, : cos.shape[1]], odd[:, cos.shape[1] : -1]), (cos, beside[1])]
    every_second = torch.stack((inputs["rope_positions"], inputs["rope_positions"] - 1), 1)[:, 0]
    for rope in tables:
        for quantity, x in results(ATTENTION, {**inputs, "rope": rope, "rope_positions": every_second}).items():
            assert torch.equal(x, plain[quantity]), quantity


def check_table_rows_and_positions_of_no_token(results: Results) -> None:
    """NaN stands in rows of the tables that no token takes, positions of the tail are anything."""
    ik.set_validation("off")
    inputs = _inputs()
    tokens, tail = sum(LENGTHS), len(inputs["k"]) - sum(LENGTHS)
    inputs["rope_positions"] = inputs["rope_positions"].clamp(2, 40)
    plain = results(ATTENTION, inputs)
    cos, sin = (table.clone() for table in inputs["rope"])
    for table in (cos, sin):
        table[:2] = table[41:] = float("nan")
    positions = inputs["rope_positions"].clone()
    positions[tokens:] = torch.tensor([0, -5, 10**12, 41]).repeat(tail)[:tail]
    for quantity, x in results(ATTENTION, {**inputs, "rope": (cos, sin), "rope_positions": positions}).items():
        assert torch.equal(x, plain[quantity]), quantity


def check_offsets_in_disorder(results: Results) -> None:
    """Nothing is read outside of the tensors, and nothing is left unwritten."""
    ik.set_validation("off")
    inputs = guarded_inputs(rope_case("", lengths=(5, 3, 40), tail=0, rope=16), torch.float32)
    for disordered in ([7, 2, 1000, -5], [1000, 9, 0, 11], [0, -3, 48, 3]):
        for quantity, x in results(ATTENTION, {**inputs, "offsets": guarded(torch.tensor(disordered))}).items():
            assert not x.isnan().any(), (quantity, disordered)


def check_a_row_alone(results: Results, dtype: torch.dtype) -> None:
    inputs = testing.make_inputs(rope_case("", rope=8, head_size=20, tail=0), dtype)
    whole, first = results(ATTENTION, inputs), 0
    for length in LENGTHS:
        rows = slice(first, first + length)
        alone = {**inputs, "offsets": offsets_of((length,))}
        for name in ("q", "k", "v", "grad_out"):
            alone[name] = inputs[name][rows].detach().requires_grad_(name != "grad_out")
        for quantity, x in results(ATTENTION, alone).items():
            assert torch.equal(x, whole[quantity][rows]), (quantity, length)
        first += length


# Checks by name, which take a backend's `results`.
CHECKS: dict[str, Callable[[Results], None]] = {
    "positions outside of the tables": check_positions_outside_of_the_tables,
    "rows longer than the tables": check_rows_longer_than_the_tables,
    "table rows and positions of no token": check_table_rows_and_positions_of_no_token,
    "offsets in disorder": check_offsets_in_disorder,
    **{
        f"strides, {dtype}": functools.partial(check_tables_and_positions_of_any_strides, dtype=dtype)
        for dtype in (F32, BF16)
    },
    **{f"a row alone, {dtype}": functools.partial(check_a_row_alone, dtype=dtype) for dtype in GPU_DTYPES},
}
