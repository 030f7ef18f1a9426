"""Rotary embedding inside Triton's attention kernels, in its interpreter: results, positions, tables, and launches."""

from __future__ import annotations

from typing import Any

import pytest
import rope_calls
import torch
from every import most_draws
from guards import guarded_inputs
from rope_calls import ATTENTION, BF16, CASES, rope_case
from torch import Tensor
from triton_calls import results

from interformer_kernels import testing
from interformer_kernels._calls import AttentionCall
from interformer_kernels._launch import rotary
from interformer_kernels._triton import _run, attention
from interformer_kernels._triton._tiles import Target
from interformer_kernels.testing import Case, offsets_of

ON_HOPPER = Target("cuda", 90)
in_turn = pytest.mark.parametrize(("case", "dtype"), CASES, ids=[case.name for case, _ in CASES])
but_the_last = pytest.mark.parametrize(("case", "dtype"), CASES[:-1], ids=[case.name for case, _ in CASES[:-1]])


@in_turn
def test_every_quantity_is_within_the_budget(case: Case, dtype: torch.dtype) -> None:
    rows = testing.compare(case, "triton", dtype, make=guarded_inputs, most_draws=most_draws(2))
    judged = {row.quantity for row in rows}
    assert judged >= {"out", "dq", "dk", "dv"} or case.head_size < 16
    assert not [row for row in rows if not row.ok]


def _watched(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], int]:
    """The results of a call, and its passes of rotary embedding."""
    names: list[str] = []
    start = _run.start

    def named(kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        start(kernel, *arguments, **constants)

    with monkeypatch.context() as patch:
        patch.setattr(_run, "start", named)
        found = results(ATTENTION, inputs)
    return found, names.count("rotate_rows")


@but_the_last
def test_a_pass_before_gives_the_same_bits(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass is taken by the number of all tokens, on which no row's bits may depend."""
    inputs = testing.make_inputs(case, dtype)
    inside, passes = _watched(inputs, monkeypatch)
    assert passes == 0
    before, passes = _rotated_before(inputs, monkeypatch)
    assert passes == 3  # keys twice, and queries in the backward
    for quantity, x in before.items():
        assert torch.equal(x, inside[quantity]), quantity


def _rotated_before(inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], int]:
    monkeypatch.setattr(rotary, "_LOADS", 0)
    monkeypatch.setattr(rotary, "_ROTATIONS", 0)
    return _watched(inputs, monkeypatch)


def test_queries_are_rotated_before_a_factor_that_rounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is far from 1 is multiplied into the queries; their bits must not depend on who rotates them."""
    inputs = testing.make_inputs(rope_case("", rope=16, options={"scale": 3e-31}), BF16)
    inputs["q"] = (inputs["q"].detach() * 2.0**100).requires_grad_()
    inside, passes = _watched(inputs, monkeypatch)
    assert passes == 2
    before, passes = _rotated_before(inputs, monkeypatch)
    assert passes == 4
    for quantity, x in before.items():
        assert torch.equal(x, inside[quantity]), quantity


def _launches(
    rows: int, length: int, channels: int = 64, rope: int = 64, target: Target = ON_HOPPER
) -> tuple[list[str], list[str]]:
    """Kernels of a forward and of a backward."""
    x = torch.empty(rows * length, 4, channels, dtype=torch.bfloat16, device="meta")
    offsets = torch.empty(rows + 1, dtype=torch.int64, device="meta")
    call = AttentionCall("packed", x, x, x, None, offsets)
    if rope:
        table = torch.empty(length, rope // 2, device="meta")
        call = call._replace(cos=table, sin=table)
    with _run.recording(target) as launches:
        out, lse, attn_out = attention.forward(call, None, True)
        forward = len(launches)
        attention.backward(call, out, attn_out, lse)
    names = [launch.kernel.fn.__name__ for launch in launches]
    return names[:forward], names[forward:]


def test_rotation_has_no_launches_of_its_own() -> None:
    for rows, length, channels, rope in ((512, 104, 64, 64), (512, 104, 48, 16), (512, 104, 16, 8), (1, 300, 64, 64)):
        without = _launches(rows, length, channels, rope=0)
        assert "rotate_rows" not in (*without[0], *without[1])
        assert _launches(rows, length, channels, rope) == without, (rows, length)


def test_long_rows_are_rotated_once() -> None:
    """Keys in the forward; queries and keys in the backward, whose gradients are rotated back inside."""
    forward, backward = _launches(16, 4096)
    assert (forward.count("rotate_rows"), backward.count("rotate_rows")) == (1, 2)


@pytest.mark.parametrize(
    ("channels", "rope", "target"),
    [(128, 128, ON_HOPPER), (64, 64, Target("cuda", 80)), (64, 58, ON_HOPPER)],
)
def test_where_registers_lack_rotation_is_a_pass_of_its_own(channels: int, rope: int, target: Target) -> None:
    forward, backward = _launches(512, 104, channels, rope, target)
    assert (forward.count("rotate_rows"), backward.count("rotate_rows")) == (2, 4)


# ---------------------------------------------------------------- positions and tables


@pytest.mark.parametrize("check", rope_calls.CHECKS)
def test_positions_tables_and_rows(check: str) -> None:
    rope_calls.CHECKS[check](results)


def test_calls_without_a_public_op_are_refused() -> None:
    x, table = torch.randn(4, 1, 8), torch.ones(4, 4)
    call = AttentionCall("packed", x, x, None, None, offsets_of((4,)), cos=table, sin=table)
    for changed in (call, call._replace(v=x, layout="shared"), call._replace(v=x, skip_prefix=1)):
        with pytest.raises(ValueError, match="attention: rope must be None"):
            attention.forward(changed, None, False)
