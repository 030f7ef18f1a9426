"""The CPU kernels: right for every option and size, and exact where numbers only pass through.

The grid of small calls is in test_parity.py; this file has the sizes that it leaves out, test_cpu_layouts.py the
layouts in memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_calls import (
    all_ops,
    bits,
    broadcast_shapes,
    differing,
    layouts,
    name_of,
    results,
    truth,
)
from every import most_draws
from torch import Tensor

import interformer_kernels
from interformer_kernels import testing
from interformer_kernels.testing import Case, make_inputs, offsets_of

_C = pytest.importorskip("interformer_kernels._C", exc_type=ImportError)

SCORES = ("softmax", "identity", "relu", "silu", "gelu")
ACTIVATIONS = ("sigmoid", "tanh", "silu", "identity")
GATES = ("full", "head", "channel", "scalar")
SMALL = (3, 0, 70)


def breaches(case: Case, dtype: torch.dtype) -> list[testing.Row]:
    return [row for row in testing.compare(case, "cpu", dtype, most_draws=most_draws(8)) if not row.ok]


# ---------------------------------------------------------------- every option and every size


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["multiply", "self"])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_and_gate(score: str, form: str, activation: str) -> None:
    maps = {"score": score, "post_scale": 1.0 if score == "softmax" else 0.5, "scale": 0.3}
    options = {**maps, "gate_form": form, "gate_activation": activation}
    sizes = {"heads": 4, "kv_heads": 2, "head_size": 8, "value_size": 6, "residual": True, "options": options}
    for i, case in enumerate(layouts(SMALL, **sizes)):
        # One kernel serves all layouts, so one layout gets all gates, and each other layout one gate.
        for gate in GATES if case.op == "pma_pooling" else GATES[i % 4 : i % 4 + 1]:
            chosen = Case(**{**vars(case), "gate": gate})
            inputs = make_inputs(chosen, torch.float64)
            torch.testing.assert_close(results(case.op, inputs), truth(case.op, inputs), msg=f"{name_of(case)} {gate}")


@pytest.mark.parametrize("skip", [0, 2, 1000])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1)], ids=str)
def test_heads_prefix_and_shared_values(heads: tuple[int, int], shared: bool, skip: int) -> None:
    lengths, options = (3, 0, 2, 65), {"skip_prefix": skip}
    case = Case(
        "pma_pooling", "", lengths=lengths, heads=heads[0], kv_heads=heads[1], head_size=8, value_size=6,
        shared_value=shared, options=options,
    )  # fmt: skip
    assert not breaches(case, torch.float64)


EVERY_LENGTH: list[tuple[torch.dtype, int, int, dict[str, Any]]] = [
    (torch.float32, 16, 16, {}),
    (torch.float32, 32, 32, {"causal": True}),
    (torch.float32, 64, 64, {"window": (9, 30)}),
    (torch.float32, 128, 128, {}),
    (torch.float32, 7, 10, {}),
    (torch.float32, 1, 33, {"window": (20, 0), "num_prefix": 5}),
    (torch.float32, 3, 100, {"causal": True}),
    (torch.float32, 33, 3, {"score": "relu", "post_scale": 0.1}),
    (torch.float32, 100, 1, {"window": (0, 70)}),
    (torch.float32, 512, 512, {}),
    (torch.float64, 16, 16, {}),
    (torch.float64, 33, 1, {"score": "silu", "post_scale": 0.1}),
    (torch.bfloat16, 32, 32, {}),
    (torch.float16, 5, 9, {"causal": True}),
]


@pytest.mark.parametrize(("dtype", "d", "dv", "options"), EVERY_LENGTH, ids=str)
def test_every_length(dtype: torch.dtype, d: int, dv: int, options: dict[str, Any]) -> None:
    """Each length from 0 to past two tiles of the longest kind: remainders of tiles, vectors and steps.

    The error of each row is relative to its own largest number, so that long rows, whose numbers are small, and short
    ones are judged alike.
    """
    lengths = tuple(range(140))
    sizes = {"heads": 1, "kv_heads": 1, "head_size": d, "value_size": dv, "options": options}
    inputs = make_inputs(Case("jagged_attention", "", lengths=lengths, **sizes), dtype)
    exact = testing.cast_inputs(inputs, torch.float64)
    coarse = testing.cast_inputs(inputs, torch.float32) if dtype == torch.float64 else inputs
    actual = results("jagged_attention", inputs)
    true, eager = truth("jagged_attention", exact), truth("jagged_attention", coarse)
    ends = offsets_of(lengths).tolist()
    for name, x in actual.items():
        largest = float(testing.differences(eager[name], true[name]).max())
        unit = torch.finfo(x.dtype).eps
        share = 3 * 2.0**-29 if dtype == torch.float64 else 2
        for length, end in zip(lengths, ends[1:], strict=True):
            row = slice(end - length, end)
            assert length == 0 or x[row].isfinite().all(), (name, length)
            error = float(testing.differences(x[row], true[name][row]).max()) if length else 0.0
            size = float(true[name][row].abs().max()) if length else 0.0
            assert error <= share * largest + 2 * unit * size, (name, length)


@pytest.mark.parametrize("op", ["pma_pooling", "gated_cross_attention", "personalized_ffn", "apply_rotary",
                                "jagged_softmax", "jagged_weighted_sum"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_length_of_the_other_ops(op: str, dtype: torch.dtype) -> None:
    for d, dv in ((2, 1), (16, 16), (33, 7)):
        rope = d // 2 * 2 if op == "apply_rotary" else 0
        sizes = {"heads": 1, "kv_heads": 1, "head_size": d, "value_size": dv, "rope": rope}
        assert not breaches(Case(op, "", lengths=tuple(range(140)), **sizes), dtype), (d, dv)


@pytest.mark.parametrize("queries", [0, 1, 5, 6, 7, 23, 200])
def test_numbers_of_queries(queries: int) -> None:
    """Tiles of queries, and blocks of them, under groups of heads that divide neither."""
    for op in ("pma_pooling", "gated_cross_attention"):
        sizes = {"queries": queries, "heads": 6, "kv_heads": 2, "head_size": 8, "value_size": 6}
        case = Case(op, "", lengths=(5, 0, 130), gate="full", **sizes)
        assert not breaches(case, torch.float32), op


@pytest.mark.parametrize(
    "case",
    [
        Case("jagged_attention", "causal", lengths=(1000,), heads=2, kv_heads=1, options={"causal": True}),
        Case("jagged_attention", "identity", lengths=(900,), heads=1, kv_heads=1, options={"score": "identity"}),
        Case("pma_pooling", "shared", lengths=(2500,), heads=2, kv_heads=1, gate="full"),
        Case("personalized_ffn", "tokens", lengths=(2000,)),
        Case("jagged_softmax", "one head", lengths=(20000, 3), heads=1),
        Case("jagged_softmax", "three heads", lengths=(9000,), heads=3),
        Case("jagged_weighted_sum", "tokens", lengths=(9000,), heads=2),
    ],
    ids=name_of,
)
def test_long_sums_stay_exact(case: Case) -> None:
    """Sums over thousands of tokens or queries in one chain would err more than PyTorch's pairwise sums."""
    assert not breaches(case, torch.float32)


@pytest.mark.parametrize("size", [511, 512])
def test_large_heads(size: int) -> None:
    case = Case("jagged_attention", "", lengths=SMALL, heads=1, kv_heads=1, head_size=size, value_size=size)
    assert not breaches(case, torch.float32)


def test_open_windows_of_any_size() -> None:
    """The largest numbers that a caller can pass mean the same as an open side."""
    inputs = make_inputs(Case("jagged_attention", "", query_lengths=(9, 2, 40, 0, 3), head_size=8), torch.float32)
    for size in (2**31, 2**62, 2**63 - 1):
        wide = results("jagged_attention", {**inputs, "window": (size, size)})
        assert not differing(wide, results("jagged_attention", inputs)), size
        assert not differing(results("jagged_attention", {**inputs, "causal": True, "num_prefix": size}), wide), size
    shared = make_inputs(Case("pma_pooling", "", options={"skip_prefix": 2**63 - 1}), torch.float32)
    assert not results("pma_pooling", shared)["out"].any()


@pytest.mark.parametrize("case", layouts((3, 1, 20), head_size=3, value_size=5), ids=name_of)
def test_gates_of_every_broadcast_shape(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    for shape in broadcast_shapes(tuple(inputs["grad_out"].shape)):
        gate = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        gated = {**inputs, "gate": gate, "gate_activation": "tanh"}
        torch.testing.assert_close(results(case.op, gated), truth(case.op, gated), msg=str(shape))


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=["no rows", "empty rows"])
def test_no_rows_and_no_tokens(lengths: tuple[int, ...], tail: int) -> None:
    for case in all_ops(lengths, tail=tail, head_size=8, value_size=6):
        gated = {"gate": "scalar"} if case.op.endswith(("attention", "pooling")) else {}
        inputs = make_inputs(Case(**{**vars(case), **gated}), torch.float32)
        for name, x in results(case.op, inputs).items():
            assert (x == (-torch.inf if name == "lse" else 0)).all(), (name_of(case), name)


# ---------------------------------------------------------------- element types


def converted(values: Tensor, residual: Tensor | None = None) -> Tensor:
    """`values` through the kernel: each is the one token of a row, so that the output is v itself."""
    n = values.numel()
    zeros = torch.zeros(n, 1, 1, dtype=values.dtype)
    added = None if residual is None else residual.view(n, 1, 1, 1)
    out = interformer_kernels.pma_pooling(
        zeros[:1], zeros, values.view(n, 1, 1), torch.arange(n + 1), residual=added, backend="cpu"
    )
    assert isinstance(out, Tensor)
    assert out.dtype == values.dtype
    return out.view(n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_pattern_comes_through(dtype: torch.dtype) -> None:
    # All but -0, which a sum that starts at 0 makes 0, as a matrix product does.
    every = torch.arange(1 - 2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    # Channels that do not rotate are not touched at all, so -0 stays.
    pairs = torch.stack((every * 0, every * 0, every), -1).view(-1, 1, 3)
    rope = testing.rotary_tables(every.numel(), 2)
    unrotated = interformer_kernels.apply_rotary(pairs, offsets_of((every.numel(),)), rope, backend="cpu")
    for actual in (converted(every), unrotated[:, 0, 2]):
        number = ~every.isnan()
        assert torch.equal(actual.view(torch.int16)[number], every.view(torch.int16)[number])
        assert actual[~number].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    """Sums of two numbers land between the numbers of the dtype, and on ties; also subnormal ones and overflows."""
    a = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    a = a[a.isfinite()]
    for shift in (0.25, 0.5, 0.75, 2.0**-10, 1.0):
        b = (a.roll(1) - a).mul(shift)
        assert torch.equal(bits(converted(a, b)), bits((a.float() + b.float()).to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "queries", "size"), [(1, 3, 16), (2, 4, 32), (3, 2, 20), (6, 1, 64), (12, 8, 16)])
def test_few_queries_under_any_number_of_heads(heads: int, queries: int, size: int, dtype: torch.dtype) -> None:
    """Heads and queries that fill no group, more than are computed at once, and rows around a block of tokens."""
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": heads, "head_size": size, "value_size": size}
    for options in ({}, {"score": "silu", "scale": 0.3}):
        case = Case("gated_cross_attention", "", (1, 47, 0, 48, 97, 6), queries=queries, options=options, **sizes)
        assert not breaches(case, dtype), options


@pytest.mark.parametrize("mask", [{"causal": True}, {"window": (30, 2)}, {"window": (9, 0), "num_prefix": 2}], ids=str)
def test_few_queries_under_masks(mask: dict[str, Any]) -> None:
    """The last tokens of long rows ask: blocks of keys that some of them do not see, and that none does."""
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "rope": 8, "positions": True}
    case = Case("jagged_attention", "", (150, 4, 0, 49), query_lengths=(4, 4, 2, 3), options=mask, **sizes)
    assert not breaches(case, torch.float32)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_beyond_the_caches_have_the_same_bits(dtype: torch.dtype, shared: bool) -> None:
    """They are written past the caches, and those of the same rows in a small call are not."""
    case = Case("pma_pooling", "", (3, 50, 0, 1) * 100, queries=2, shared_value=shared, tail=0)
    inputs = make_inputs(case, dtype)
    times = 2**26 // inputs["k"].nbytes
    many = {name: inputs[name] for name in inputs}
    for name in ("k", "v", "grad_out"):
        if many.get(name) is not None:
            x = inputs[name].detach()
            many[name] = x.repeat(times, *[1] * (x.dim() - 1)).requires_grad_(name != "grad_out")
    many["offsets"] = offsets_of((3, 50, 0, 1) * 100 * times)
    small, large = results(case.op, inputs), results(case.op, many)
    for name in ("dk",) if shared else ("dk", "dv"):
        rows = small[name]
        assert torch.equal(large[name], rows.repeat(times, *[1] * (rows.dim() - 1))), name


@pytest.mark.parametrize("op", ["pma_pooling", "jagged_attention"])
def test_megabytes_on_huge_pages(op: str) -> None:
    """Outputs and gradients of more than 8 MiB, which end inside a page."""
    case = Case(op, "large", lengths=(8, 0, 1) * 2000, heads=2, kv_heads=2, head_size=47, value_size=41, queries=4)
    inputs = make_inputs(case, torch.float64)
    actual = results(op, inputs)
    assert all(actual[name].nbytes > 2**23 for name in ("dk", "dv"))
    torch.testing.assert_close(actual, truth(op, inputs))


def test_gradients_are_checked_numerically() -> None:
    for case in all_ops((2, 0, 5), heads=2, kv_heads=1, head_size=6, value_size=3, queries=2, tail=0):
        inputs = make_inputs(case, torch.float64)
        names = [name for name in testing.DIFFERENTIABLE[case.op] if inputs.get(name) is not None]

        def run(*leaves: Tensor, op: str = case.op, inputs: Any = inputs, names: Any = tuple(names)) -> Tensor:
            return testing.call(op, {**inputs, **dict(zip(names, leaves, strict=True))}, "cpu")[0]

        assert torch.autograd.gradcheck(run, [inputs[name] for name in names]), name_of(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [64, 1])
def test_outputs_that_exceed_the_caches(dtype: torch.dtype, inputs: int) -> None:
    """They are written past the caches, with the bits of the same rows in a small call."""
    rows, each = (
        ((34 << 20) // (64 * 64 * dtype.itemsize), 1) if inputs == 64 else (2, (17 << 20) // (64 * dtype.itemsize))
    )
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.rand(rows * each, width, generator=generator).to(dtype) for width in (inputs, 64))
    weight = torch.rand(rows, inputs, 64, generator=generator).to(dtype)
    offsets = torch.arange(rows + 1) * each

    def first(count: int) -> tuple[Tensor, ...]:
        leaves = [x[: count * each].clone().requires_grad_(), weight[:count].clone().requires_grad_()]
        out = interformer_kernels.personalized_ffn(leaves[0], leaves[1], offsets[: count + 1], backend="cpu")
        return out, *torch.autograd.grad(out, leaves, grad[: count * each])

    whole, part = first(rows), first(max(rows // 64, 1))
    assert max(made.nbytes for made in whole) > 32 << 20 >= max(made.nbytes for made in part)
    for made, again in zip(whole, part, strict=True):
        assert made.isfinite().all()
        assert torch.equal(made[: len(again)], again)
