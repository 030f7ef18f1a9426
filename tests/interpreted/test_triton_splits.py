"""Splits of long rows under few queries: which programs take them and combine them, for offsets of any content."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from guards import guarded, guarded_inputs
from triton_calls import results

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels._launch import splits
from interformer_kernels._triton import _run
from interformer_kernels._triton._arguments import Offsets, Sizes
from interformer_kernels._triton._attention_output import _row_to_combine, partial_index
from interformer_kernels._triton._attention_tiles import _split_task
from interformer_kernels._triton._programs import Side, splits_of
from interformer_kernels.testing import Case, offsets_of

SPLIT = 32
# Rows without tokens first, last and many; a long row among tiny ones; rows of one split, and of one token more.
UNEVEN = (0, 0, 1, 3, 0, 300, 2, 1, *(0,) * 9, SPLIT, SPLIT + 1, 7, 2 * SPLIT, 0, 0)
OPS = ["pma_pooling", "gated_cross_attention"]


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "SPLIT_KV", SPLIT)


@triton.jit
def _tasks(offsets, split_list, to, rows, k_tokens, skip, SPLIT_KV: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row, first key, keys, split and partial of a program of the kernels that take splits; -1 if it is idle."""
    i = tl.program_id(0)
    sizes = Sizes(rows, 0, k_tokens, 1, skip)
    row, k_first, keys, i_split, idle = _split_task(i, Offsets(None, offsets), split_list, sizes, SPLIT_KV)
    tl.store(to + 5 * i, tl.where(idle, -1, row))
    tl.store(to + 5 * i + 1, k_first)
    tl.store(to + 5 * i + 2, keys)
    tl.store(to + 5 * i + 3, i_split)
    tl.store(to + 5 * i + 4, partial_index(k_first, i_split, SPLIT_KV))


@triton.jit
def _combined(offsets, split_rows, to, rows, k_tokens, skip, SPLIT_KV: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row, first key and keys of a program of the kernels that combine; no keys if it is idle."""
    i = tl.program_id(0)
    row, _, k_first, keys = _row_to_combine(i, offsets, split_rows, Sizes(rows, 0, k_tokens, 1, skip), 1, SPLIT_KV, 1)
    tl.store(to + 3 * i, row)
    tl.store(to + 3 * i + 1, k_first)
    tl.store(to + 3 * i + 2, keys)


def check_programs(offsets: torch.Tensor, tokens: int, skip: int, facts: Any = None) -> tuple[int, int, int]:
    """Each row has a program for all of its keys, or one for each split and one that combines them, from partials of
    its own. Returns the numbers of split rows, of programs, and of idle ones.
    """
    rows, side = len(offsets) - 1, Side(offsets, tokens, None, 0, facts)
    chosen = splits_of(side, skip, SPLIT)
    tasks = torch.full((rows + chosen.later, 5), -9)
    combined = torch.full((chosen.combined, 3), -9)
    arguments = rows, tokens, skip
    _tasks[(len(tasks),)](offsets, chosen.split_list, tasks, *arguments, SPLIT_KV=SPLIT)
    if len(combined):
        _combined[(len(combined),)](offsets, chosen.split_rows, combined, *arguments, SPLIT_KV=SPLIT)
    live = [task for task in tasks.tolist() if task[0] >= 0]
    to_combine = [row for row in combined.tolist() if row[2]]
    bounds = [min(max(int(x), 0), tokens) for x in offsets]
    partials: list[int] = []
    split_rows = 0
    for row in range(rows):
        first, keys = bounds[row] + skip, max(bounds[row + 1] - bounds[row] - skip, 0)
        of_row = sorted(task[3] for task in live if task[0] == row)
        assert all(task[1:3] == [first, keys] for task in live if task[0] == row)
        found = [entry for entry in to_combine if entry[0] == row]
        if of_row == [-1]:
            assert not found
            continue
        assert of_row == list(range(-(-keys // SPLIT)))
        assert keys > SPLIT
        assert found == [[row, first, keys]]
        split_rows += 1
        partials += [task[4] for task in live if task[0] == row]
    assert len(to_combine) == split_rows
    assert len(set(partials)) == len(partials)
    assert all(0 <= partial < splits.num_partials(tokens, SPLIT) for partial in partials)
    return split_rows, len(tasks) + len(combined), len(tasks) - len(live) + len(combined) - len(to_combine)


@pytest.mark.parametrize("skip", [0, 3, 40])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_each_split_has_a_program(dtype: torch.dtype, skip: int) -> None:
    for lengths, tail in ((UNEVEN, 0), (UNEVEN[::-1], 70), ((0,) * 5, 40), ((SPLIT * 3,) * 4, 0), ((1,) * 90, 0)):
        offsets = offsets_of(lengths).to(dtype)
        tokens = sum(lengths) + tail
        split_rows, programs, _ = check_programs(offsets, tokens, skip)
        assert split_rows == sum(length - skip > SPLIT for length in lengths)
        assert programs <= len(lengths) + 2 * -(-tokens // SPLIT)


@pytest.mark.parametrize("skip", [0, 3])
def test_a_plan_leaves_no_program_idle(skip: int) -> None:
    for lengths in (UNEVEN, UNEVEN[::-1], (SPLIT * 3,) * 4, (1,) * 90):
        offsets = offsets_of(lengths)
        with ik.plan(offsets) as plan:
            split_rows, programs, idle = check_programs(offsets, sum(lengths), skip, plan._facts)
        counts = [-(-(length - skip) // SPLIT) for length in lengths if length - skip > SPLIT]
        assert (split_rows, programs, idle) == (len(counts), len(lengths) + sum(counts), 0)


def test_disordered_rows_are_split_where_all_programs_agree() -> None:
    """Overlaps, decreases, and entries beyond the tokens, near to sorted offsets and far from them."""
    generator = random.Random(0)
    whole = split = 0
    for number in range(60):
        values = sorted(generator.randint(0, 400) for _ in range(12))
        for _ in range(number % 4):
            values[generator.randrange(12)] = generator.choice((generator.randint(-10, 450), 2**62, -(2**62)))
        if number % 10 == 9:
            generator.shuffle(values)
        found, _, _ = check_programs(torch.tensor(values), 400, number % 3)
        bounds = [min(max(value, 0), 400) for value in values]
        split += found
        whole += sum(bounds[i + 1] - bounds[i] - number % 3 > SPLIT for i in range(11)) - found
    # Both kinds were there.
    assert split > 100
    assert whole > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_disordered_rows_have_the_results_of_their_tokens(op: str, dtype: torch.dtype) -> None:
    """Whether a row is split or not; nothing is read beside the tensors, and two runs have the same bits."""
    ik.set_validation("off")
    inputs = guarded_inputs(Case(op, "", lengths=(90, 3, 40, 67), tail=0, heads=2, kv_heads=2), dtype)
    name = "kv_offsets" if op == "gated_cross_attention" else "offsets"
    for values in ([70, 2, 1000, -5, 90], [0, 100, 5, 120, 200], [3, 190, 90, 193, 200], [100, 0, 200, 0, 200]):
        disordered = {**inputs, name: guarded(torch.tensor(values))}
        runs = [results(op, disordered) for _ in range(2)]
        for quantity, x in runs[0].items():
            assert torch.equal(x, runs[1][quantity]), (quantity, values)
            assert not x.isnan().any(), (quantity, values)
        bounds = [min(max(value, 0), 200) for value in values]
        for row in range(4):
            first, last = bounds[row], max(bounds[row], bounds[row + 1])
            alone = {**inputs, "k": inputs["k"][first:last], name: torch.tensor([0, last - first])}
            alone["v"] = None if inputs["v"] is None else inputs["v"][first:last]
            if op == "gated_cross_attention":
                alone["q"] = inputs["q"][row : row + 1]
            wanted = testing.call(op, alone, "reference")[0][0]
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(runs[0]["out"][row], wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_rows_of_all_lengths(op: str, dtype: torch.dtype) -> None:
    """Within the budget, with the bits that each row has alone, and with the same bits under a plan."""
    case = Case(op, "", lengths=UNEVEN, heads=2, kv_heads=2, gate="full", residual=True)
    rows = testing.compare(case, "triton", dtype, make=guarded_inputs, most_draws=1)
    assert not [row for row in rows if not row.ok]
    inputs = testing.make_inputs(case, dtype)
    together = results(op, inputs)
    for b in (0, 3, 5, 17, 18, 20, len(UNEVEN) - 1):
        for quantity, single in results(op, testing.alone(inputs, UNEVEN, b)).items():
            among_others = testing.row_of(together[quantity], UNEVEN, b)
            assert quantity == "dseeds" or torch.equal(among_others, single), (quantity, b)
    with ik.plan(inputs["kv_offsets" if op == "gated_cross_attention" else "offsets"]):
        for quantity, x in results(op, inputs).items():
            assert torch.equal(x, together[quantity]), quantity


@pytest.mark.parametrize("op", OPS)
def test_a_plan_of_short_rows_combines_nothing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = testing.make_inputs(Case(op, "", lengths=(SPLIT,) * 4, heads=2, kv_heads=2), torch.float32)
    wanted = results(op, inputs)
    launches: dict[str, int] = {}
    start = _run.start

    def seen(kernel: Any, grid: int, *arguments: Any, **named: Any) -> None:
        if grid:
            launches[kernel.fn.__name__] = grid
        start(kernel, grid, *arguments, **named)

    monkeypatch.setattr(_run, "start", seen)
    with ik.plan(inputs["kv_offsets" if op == "gated_cross_attention" else "offsets"]):
        for quantity, x in results(op, inputs).items():
            assert torch.equal(x, wanted[quantity]), quantity
    assert not {"combine_partials", "add_partials"} & set(launches)
    assert launches["attention_forward"] == 4
    results(op, inputs)
    assert "combine_partials" in launches
