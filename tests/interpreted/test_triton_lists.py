"""Lists of live tiles: what they hold for offsets of any content, and that results have the same bits with them."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from guards import guarded_inputs
from triton_calls import results

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels._triton import _programs, _run
from interformer_kernels._triton._programs import Programs, Side, TileLists
from interformer_kernels.testing import Case, offsets_of

_FIELDS = 6


@pytest.fixture(autouse=True)
def _lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call makes lists, of few rows a program."""
    monkeypatch.setattr(_programs, "MANY_ROWS", 0)
    monkeypatch.setattr(_programs, "ROWS", 4)


def entries_of(programs: Programs) -> list[list[int]]:
    """The entries of a list: row, tile, and first token and number of tokens on both sides."""
    assert programs.tile_list is not None
    numbers = programs.tile_list.tolist()
    assert 0 <= numbers[0] < len(numbers) // _FIELDS
    return [numbers[_FIELDS * i : _FIELDS * (i + 1)] for i in range(1, numbers[0] + 1)]


def listed(offsets: torch.Tensor, tokens: int, per_token: int, block: int, cell: int) -> list[list[int]]:
    """The list of self attention."""
    return entries_of(TileLists().programs(Side(offsets, tokens, offsets, tokens), per_token, block, cell, 1, True))


@pytest.mark.parametrize("cell", [0, 5])
@pytest.mark.parametrize(("per_token", "block"), [(1, 4), (3, 4), (2, 16)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_live_tiles_are_listed_in_order(dtype: torch.dtype, per_token: int, block: int, cell: int) -> None:
    lengths = (0, 3, 21, 5, 0, 0, 6, 1, 40, 2, 7, 0)
    for rows in range(len(lengths) + 1):
        offsets = offsets_of(lengths[:rows]).to(dtype)
        tokens = int(offsets[-1]) + 9
        wanted = []
        for row, length in enumerate((*lengths[:rows], 9)):
            first, keys = int(offsets[row]), length if row < rows else 0
            if row == rows or length > cell:
                tiles = range(-(-length * per_token // block))
                wanted += [[row, tile, first, length, first, keys] for tile in tiles]
        assert listed(offsets, tokens, per_token, block, cell) == wanted


def test_rows_are_short_on_both_sides() -> None:
    q_offsets, kv_offsets = offsets_of((3, 2, 9, 0, 1)), offsets_of((4, 8, 1, 2, 0))
    side = Side(q_offsets, 16, kv_offsets, 15)
    wanted = [[1, 0, 3, 2, 4, 8], [2, 0, 5, 9, 12, 1], [2, 1, 5, 9, 12, 1], [5, 0, 15, 1, 15, 0]]
    assert entries_of(TileLists().programs(side, 1, 8, 4, 1, True)) == wanted


def test_every_token_is_listed_once_whatever_the_offsets() -> None:
    """A row that is not short by the offsets' own word is listed, and nothing leads out of bounds."""
    generator = random.Random(0)
    for _ in range(30):
        values = [generator.choice((generator.randint(-10, 50), 2**62, -(2**62))) for _ in range(11)]
        offsets = torch.tensor(values)
        covered = [0] * 40
        for row, tile, first, count, k_first, keys in listed(offsets, 40, 1, 4, 3):
            assert row <= 10
            assert k_first >= 0
            assert keys >= 0
            assert k_first + keys <= 40
            assert first + count <= 40
            for token in range(first + 4 * tile, min(first + 4 * tile + 4, first + count)):
                covered[token] += 1
        clamped = [min(max(value, 0), 40) for value in values]
        short = [0] * 40
        for begin, end in itertools.pairwise(clamped):
            if 0 <= end - begin <= 3:
                for token in range(begin, end):
                    short[token] += 1
        assert max(covered) <= 1
        assert all(a or b for a, b in zip(covered, short, strict=True)), values


_MIXED = (5, 40, 3, 0, 70, 2, 1, 1, 133, 4, 0, 190, 6, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [Case("jagged_attention", "long", lengths=(40, 3, 0, 70, 35, 64), heads=4, kv_heads=2, gate="head", residual=True),
     Case("jagged_attention", "short", lengths=(*_MIXED, *(1,) * 40), heads=2, kv_heads=2, options={"causal": True}),
     Case("jagged_attention", "cross", lengths=_MIXED, query_lengths=_MIXED[::-1], heads=2, kv_heads=2),
     Case("gated_cross_attention", "dense", lengths=_MIXED, heads=4, kv_heads=4, queries=2),
     Case("pma_pooling", "shared", lengths=_MIXED, heads=2, kv_heads=2, options={"skip_prefix": 2})],
    ids=lambda case: case.name,
)  # fmt: skip
def test_results_have_the_same_bits(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With lists, and with persistent programs, which take several tiles each where most rows are short."""
    inputs = testing.make_inputs(case, dtype)
    monkeypatch.setattr(_programs, "_PER_PROCESSOR", 3)
    kinds: list[Any] = []
    start = _run.start

    def seen(kernel: Any, grid: int, *arguments: Any, **named: Any) -> None:
        kinds.append(named.get("PERSISTENT", kernel.fn.__name__))
        start(kernel, grid, *arguments, **named)

    monkeypatch.setattr(_run, "start", seen)
    with_lists = results(case.op, inputs)
    assert "list_tiles" in kinds
    # Rows are short on average: for the forward in one case, for the backward, which takes whole rows, in others too.
    assert (True in kinds) == (case.name in ("short", "long", "cross") and dtype == torch.bfloat16)
    monkeypatch.setattr(_programs, "MANY_ROWS", 1000)
    kinds.clear()
    searched = results(case.op, inputs)
    assert "list_tiles" not in kinds
    assert True not in kinds
    for quantity, x in searched.items():
        assert torch.equal(with_lists[quantity], x), quantity


@pytest.mark.parametrize("op", ["jagged_attention", "pma_pooling", "gated_cross_attention"])
def test_offsets_of_any_content(op: str) -> None:
    """Nothing is read outside of the tensors, and nothing is left unwritten; there NaN stands in these tests."""
    ik.set_validation("off")
    inputs = guarded_inputs(Case(op, "", lengths=(25, 33, 4), tail=0, heads=2, kv_heads=2), torch.float32)
    name = "kv_offsets" if op == "gated_cross_attention" else "offsets"
    most, least = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min
    cut = results(op, {**inputs, name: torch.tensor([0, 30, 62, 62])})
    for quantity, x in results(op, {**inputs, name: torch.tensor([least, 30, 90, most])}).items():
        assert torch.equal(x, cut[quantity]), quantity
    for disordered in ([50, 2, most, least], [most, 9, 0, 40], [0, least, 62, 3], [0, 60, 20, 62]):
        for quantity, x in results(op, {**inputs, name: torch.tensor(disordered)}).items():
            assert not x.isnan().any(), (quantity, disordered)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [Case("jagged_attention", "long", lengths=(40, 50), heads=2, kv_heads=2, tail=0),
     Case("jagged_attention", "short", lengths=(5, 0, 3), heads=2, kv_heads=2, tail=0),
     Case("jagged_attention", "mixed", lengths=(5, 70, 3), heads=4, kv_heads=2, gate="head"),
     Case("jagged_attention", "cross", lengths=(5, 70, 3), query_lengths=(60, 2, 4), heads=2, kv_heads=2),
     Case("gated_cross_attention", "dense", lengths=(5, 0, 90), heads=4, kv_heads=4, queries=2)],
    ids=lambda case: case.name,
)  # fmt: skip
def test_results_with_a_plan_have_the_same_bits(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists are made once for both directions and later calls, grids are exact, and idle kernels are left out."""
    monkeypatch.setattr(_programs, "MANY_ROWS", 1000)
    inputs = testing.make_inputs(case, dtype)
    searched = results(case.op, inputs)
    launches: list[tuple[str, int]] = []
    start = _run.start

    def seen(kernel: Any, grid: int, *arguments: Any, **named: Any) -> None:
        if grid:
            launches.append((kernel.fn.__name__, grid))
        start(kernel, grid, *arguments, **named)

    monkeypatch.setattr(_run, "start", seen)
    held = [ik.plan(inputs[name]) for name in ("offsets", "kv_offsets") if inputs.get(name) is not None]
    for _ in range(2):
        launches.clear()
        for quantity, x in results(case.op, inputs).items():
            assert torch.equal(x, searched[quantity]), quantity
        names = {name for name, _ in launches}
        if case.name in ("long", "short"):
            assert any("short" in name for name in names) == (case.name == "short")
            assert ("attention_forward" in names) == (case.name == "long")
            # In 16 bits the backward takes these rows whole.
            whole = dtype != torch.float32
            assert ("attention_backward_whole" in names) == (case.name == "long" and whole)
            assert ("attention_grad_keys" in names) == (case.name == "long" and not whole)
        if case.name == "long" and dtype == torch.bfloat16:
            assert dict(launches)["attention_forward"] == 2 * 2  # a tile of each row, under two heads
    assert "list_tiles" not in names
    for plan in held:
        plan.close()
    launches.clear()
    results(case.op, inputs)
    assert case.op != "jagged_attention" or "attention_forward_short" in dict(launches)


def test_a_plan_of_offsets_that_changed_is_refused() -> None:
    x, offsets = torch.randn(7, 2, 8), offsets_of((3, 4))
    with ik.plan(offsets):
        offsets[1] = 2
        with pytest.raises(RuntimeError, match="were written to after"):
            ik.jagged_attention(x, x, x, offsets, backend="triton")
    ik.jagged_attention(x, x, x, offsets, backend="triton")


def test_tensors_of_fewer_tokens_than_the_plan_cut_its_rows() -> None:
    ik.set_validation("off")
    x, offsets = torch.randn(50, 2, 8), offsets_of((3, 40, 30))
    with ik.plan(offsets):
        cut = ik.jagged_attention(x, x, x, offsets, backend="triton")
    assert torch.equal(cut, ik.jagged_attention(x, x, x, offsets_of((3, 40, 7)), backend="triton"))
