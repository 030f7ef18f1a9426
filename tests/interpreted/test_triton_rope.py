"""Rotary embedding inside Triton's attention kernels, in its interpreter: results, positions, tables, and launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every import most_draws
from guards import guarded, guarded_inputs
from torch import Tensor
from triton_calls import results

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels._calls import AttentionCall
from interformer_kernels._triton import _attention_problem, _run, attention
from interformer_kernels._triton._tiles import Target
from interformer_kernels.testing import Case, offsets_of

ATTENTION = "jagged_attention"
ON_HOPPER = Target("cuda", 90)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of short kernels and of long ones, over several tiles; empty rows, and a tail.
LENGTHS = (40, 3, 0, 17)


def _case(name: str, **fields: Any) -> Case:
    return Case(ATTENTION, name, **{"lengths": LENGTHS, "heads": 2, "kv_heads": 1, **fields})


F32, BF16, F16 = DTYPES
CASES = [
    (_case("all channels", rope=16), F32),
    (_case("interleaved", rope=16, options={"rope_interleaved": True}), BF16),
    (_case("few of many channels", rope=8, head_size=20, positions=True), F16),
    (_case("few of many channels, interleaved", rope=8, head_size=20, options={"rope_interleaved": True}), F32),
    (_case("no power of two", rope=24, head_size=24, options={"causal": True}), BF16),
    (_case("some of no power of two", rope=24, head_size=31, positions=True,
           options={"window": (20, 3), "num_prefix": 1}), F32),
    (_case("cross, gated", rope=8, query_lengths=(5, 40, 3, 33), positions=True, gate="full", residual=True), BF16),
    (_case("silu", rope=16, options={"score": "silu", "post_scale": 0.5}), F32),
    (_case("negative scale", rope=16, options={"scale": -0.3}), BF16),
    (_case("a pair of its own", rope=2, head_size=4), F16),
]  # fmt: skip
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
    monkeypatch.setattr(_attention_problem, "_LOADS", 0)
    monkeypatch.setattr(_attention_problem, "_ROTATIONS", 0)
    return _watched(inputs, monkeypatch)


def test_queries_are_rotated_before_a_factor_that_rounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is far from 1 is multiplied into the queries; their bits must not depend on who rotates them."""
    inputs = testing.make_inputs(_case("", rope=16, options={"scale": 3e-31}), BF16)
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
    without = _launches(512, 104, rope=0)
    assert "rotate_rows" not in (*without[0], *without[1])
    for rows, length, channels, rope in ((512, 104, 64, 64), (512, 104, 48, 16), (512, 104, 16, 8), (1, 300, 64, 64)):
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


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return testing.make_inputs(_case("", rope=8, positions=True), dtype)


def test_positions_outside_of_the_tables_are_clamped() -> None:
    ik.set_validation("off")
    inputs = _inputs()
    rows, tokens = inputs["rope"][0].shape[0], inputs["rope_positions"].shape[0]
    limits = torch.iinfo(torch.int64)
    outside = torch.tensor([limits.min, -1, 0, rows - 1, rows, limits.max]).repeat(tokens)[:tokens]
    clamped = results(ATTENTION, {**inputs, "rope_positions": outside.clamp(0, rows - 1)})
    for quantity, x in results(ATTENTION, {**inputs, "rope_positions": guarded(outside)}).items():
        assert torch.equal(x, clamped[quantity]), quantity


def test_rows_longer_than_the_tables_are_clamped() -> None:
    ik.set_validation("off")
    inputs = _inputs()
    inputs["rope"] = tuple(guarded(table[:20].clone()) for table in inputs["rope"])
    positions = torch.cat([torch.arange(n) for n in (*LENGTHS, len(inputs["k"]) - sum(LENGTHS))])
    clamped = results(ATTENTION, {**inputs, "rope_positions": positions.clamp(max=19)})
    for quantity, x in results(ATTENTION, {**inputs, "rope_positions": None}).items():
        assert torch.equal(x, clamped[quantity]), quantity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_and_positions_of_any_strides(dtype: torch.dtype) -> None:
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


def test_table_rows_and_positions_of_no_token_are_not_used() -> None:
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


def test_offsets_in_disorder() -> None:
    """Nothing is read outside of the tensors, and nothing is left unwritten."""
    ik.set_validation("off")
    inputs = guarded_inputs(_case("", lengths=(5, 3, 40), tail=0, rope=16), torch.float32)
    for disordered in ([7, 2, 1000, -5], [1000, 9, 0, 11], [0, -3, 48, 3]):
        for quantity, x in results(ATTENTION, {**inputs, "offsets": guarded(torch.tensor(disordered))}).items():
            assert not x.isnan().any(), (quantity, disordered)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_what_it_is_alone(dtype: torch.dtype) -> None:
    inputs = testing.make_inputs(_case("", rope=8, head_size=20, tail=0), dtype)
    whole, first = results(ATTENTION, inputs), 0
    for length in LENGTHS:
        rows = slice(first, first + length)
        alone = {**inputs, "offsets": offsets_of((length,))}
        for name in ("q", "k", "v", "grad_out"):
            alone[name] = inputs[name][rows].detach().requires_grad_(name != "grad_out")
        for quantity, x in results(ATTENTION, alone).items():
            assert torch.equal(x, whole[quantity][rows]), (quantity, length)
        first += length


def test_calls_without_a_public_op_are_refused() -> None:
    x, table = torch.randn(4, 1, 8), torch.ones(4, 4)
    call = AttentionCall("packed", x, x, None, None, offsets_of((4,)), cos=table, sin=table)
    for changed in (call, call._replace(v=x, layout="shared"), call._replace(v=x, skip_prefix=1)):
        with pytest.raises(ValueError, match="attention: rope must be None"):
            attention.forward(changed, None, False)
