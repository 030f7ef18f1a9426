"""Rotary embedding inside the CUDA attention kernels, emulated: results, positions, tables, and launches."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import rope_calls
import torch
from cuda_calls import results
from every import most_draws
from guards import guarded_inputs
from memory import names_of
from rope_calls import ATTENTION, BF16, CASES, F16, F32, rope_case
from torch import Tensor

from interformer_kernels import _C, testing
from interformer_kernels._calls import AttentionCall
from interformer_kernels._cuda import attention
from interformer_kernels._launch import rotary
from interformer_kernels.testing import Case, offsets_of

WAYS = {"in_order": (0, True), "shuffled": (1, False)}
# Every padded width that rotates, warps that work alone or together, rows of one and of several tiles.
SIZED = [
    (rope_case("width 32", rope=32, head_size=32, lengths=(70, 0, 1), options={"causal": True}), BF16),
    (rope_case("width 64, grouped", heads=6, kv_heads=2, rope=56, head_size=64, lengths=(2, 90)), F16),
    (rope_case("width 64", rope=64, head_size=64, value_size=8, lengths=(70, 40), gate="head"), F32),
    (rope_case("width 64, interleaved", rope=40, head_size=44, value_size=64, lengths=(40, 3),
               options={"rope_interleaved": True}), F16),
    (rope_case("many rows", rope=16, lengths=(0, 1, 5, 2, 9) * 5, positions=True), F16),
    (rope_case("one long row", rope=8, lengths=(300, 1), heads=1, options={"window": (70, 0)}), BF16),
]  # fmt: skip
APART = [
    CASES[-1],
    (rope_case("width 128", rope=128, head_size=128, value_size=128, lengths=(40, 3)), BF16),
    (rope_case("wide values", rope=16, value_size=132, lengths=(40, 2)), F16),
]
INSIDE = CASES[:-1] + SIZED


def _each(cases: list[tuple[Case, torch.dtype]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("case", "dtype"), cases, ids=[case.name for case, _ in cases])


@pytest.mark.parametrize("way", WAYS)
@_each(INSIDE + APART)
def test_every_quantity_is_within_the_budget(case: Case, dtype: torch.dtype, way: str, emulated: ModuleType) -> None:
    emulated.configure(*WAYS[way])
    rows = testing.compare(case, "cuda", dtype, make=guarded_inputs, most_draws=most_draws(2))
    judged = {row.quantity for row in rows}
    assert judged >= {"out", "dq", "dk", "dv"} or case.head_size < 16
    assert not [row for row in rows if not row.ok]


def test_products_in_tf32_are_within_the_budget_of_float16(tf32: None) -> None:
    """Rotated numbers are not rounded before they are operands, which have as many bits as float16."""
    case = rope_case("tf32", rope=16, lengths=(40, 3), gate="full")
    rows = testing.compare(case, "cuda", torch.float32, most_draws=most_draws(2))
    budgets = testing.compare(case, "cuda", torch.float16, most_draws=most_draws(2))
    for row, other in zip(rows, budgets, strict=True):
        assert row.error <= other.budget, row.quantity


def _watched(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], int]:
    """The results of a call, and its passes of rotary embedding."""
    passes, rotate = [], _C.cuda_apply_rotary
    with monkeypatch.context() as patch:
        patch.setattr(_C, "cuda_apply_rotary", lambda *call: (passes.append(call), rotate(*call)))
        return results(ATTENTION, inputs), len(passes)


@_each(INSIDE)
def test_a_pass_before_gives_the_same_bits(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass is taken by the number of all tokens, on which no row's bits may depend."""
    inputs = testing.make_inputs(case, dtype)
    inside, passes = _watched(inputs, monkeypatch)
    assert passes == 0
    monkeypatch.setattr(rotary, "_LOADS", 0)
    monkeypatch.setattr(rotary, "_ROTATIONS", 0)
    before, passes = _watched(inputs, monkeypatch)
    assert passes == 3  # keys twice, and queries in the backward
    for quantity, x in before.items():
        assert torch.equal(x, inside[quantity]), quantity


@_each(INSIDE)
def test_kernels_that_know_no_rotation_give_the_same_bits(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for gradients of queries and keys in 16 bits, which are rounded once more before a pass rotates them back."""
    inputs = testing.make_inputs(case, dtype)
    inside = results(ATTENTION, inputs)
    monkeypatch.setattr(_C, "cuda_widest_rope", 0)
    apart, passes = _watched(inputs, monkeypatch)
    assert passes == 6
    for quantity, x in apart.items():
        if quantity in ("dq", "dk") and dtype != F32:
            continue
        assert torch.equal(x, inside[quantity]), quantity


# ---------------------------------------------------------------- launches


def _launches(emulated: ModuleType, rows: int, length: int, channels: int = 64, rope: int = 64) -> list[list[str]]:
    """Kernels of a forward and of a backward, which are listed instead of run."""
    x = torch.zeros(rows * length, 2, channels, dtype=BF16)
    call = AttentionCall("packed", x, x, x, None, torch.arange(rows + 1) * length)
    if rope:
        table = torch.zeros(length, rope // 2)
        call = call._replace(cos=table, sin=table)
    emulated.list_launches(True)
    try:
        out, lse, attn_out = attention.forward(call, None, False)
        forward = len(emulated.launches())
        attention.backward(call, out, attn_out, lse)
        listed = emulated.launches()
    finally:
        emulated.list_launches(False)
    of_symbols = names_of(str(emulated.__file__))
    names = [of_symbols[kernel].split("<")[0] for kernel, *_ in listed]
    return [names[:forward], names[forward:]]


def test_rotation_has_no_launches_of_its_own(emulated: ModuleType) -> None:
    without = _launches(emulated, 20, 104, rope=0)
    kernels = [[name for name in names if name != "list_long_rows"] for names in without]
    assert kernels == [["attend"], ["sum_query_stats", "grad_queries", "grad_keys"]]
    for rows, length, channels, rope in ((20, 104, 64, 64), (20, 104, 48, 16), (20, 104, 64, 8)):
        assert _launches(emulated, rows, length, channels, rope) == without, (rows, length, channels)
    assert _launches(emulated, 1, 300) == _launches(emulated, 1, 300, rope=0)


def test_long_rows_are_rotated_once(emulated: ModuleType) -> None:
    """Keys in the forward; queries and keys in the backward, whose gradients are rotated back inside."""
    forward, backward = _launches(emulated, 4, 4096, 16, 16)
    assert (forward.count("rotate_rows"), backward.count("rotate_rows")) == (1, 2)


@pytest.mark.parametrize(("channels", "rope"), [(72, 64), (64, 58)])
def test_what_kernels_cannot_rotate_has_passes_of_its_own(emulated: ModuleType, channels: int, rope: int) -> None:
    forward, backward = _launches(emulated, 20, 104, channels, rope)
    assert (forward.count("rotate_rows"), backward.count("rotate_rows")) == (2, 4)


# ---------------------------------------------------------------- positions and tables


@pytest.mark.parametrize("check", rope_calls.CHECKS)
def test_positions_tables_and_rows(check: str) -> None:
    rope_calls.CHECKS[check](results)


# ---------------------------------------------------------------- refusals


def test_calls_that_the_kernels_cannot_rotate_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, wide, table = torch.randn(4, 1, 8), torch.randn(4, 1, 132), torch.ones(4, 4)
    call = AttentionCall("packed", x, x, x, None, offsets_of((4,)), cos=table, sin=table)
    for changed in (call._replace(v=None), call._replace(layout="shared"), call._replace(skip_prefix=1)):
        with pytest.raises(ValueError, match="attention: rope must be None"):
            attention.forward(changed, None, False)
    # The adapter never passes on such tables.
    monkeypatch.setattr(_C, "cuda_widest_rope", 256)
    monkeypatch.setattr(attention, "_tables", lambda cos, sin: (cos, sin))
    strays = torch.ones(17)[1:].view(4, 4)
    for changed, message in (
        (call._replace(q=wide, k=wide, v=wide), "cos must be None for heads of more than 64 channels"),
        (call._replace(cos=strays), "cos must be tables with rows of 4n numbers, aligned to 16 bytes"),
        (call._replace(sin=torch.ones(4, 5)[:, :4]), "cos must be tables with rows of 4n numbers"),
        (call._replace(sin=torch.ones(4, 8)[:, :4]), "sin must be of cos's strides"),
    ):
        with pytest.raises(ValueError, match=message):
            attention.forward(changed, None, False)
