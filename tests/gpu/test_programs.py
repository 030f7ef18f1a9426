"""Grids of jagged attention's launches: which programs have work, and what a plan leaves out."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from resources import programs
from resources.programs import Batch, Programs, programs_of


def _by_kernel(batch: Batch, way: str) -> dict[str, Programs]:
    return {launch.kernel: launch for launch in programs_of(batch, way)}


def test_live_programs_are_those_that_a_plan_starts() -> None:
    lengths = torch.tensor([5, 40, 0, 130, 64, 3, 32, 33, 65])
    batch = Batch("", lengths, 4, 64)
    searched, planned = _by_kernel(batch, "search"), _by_kernel(batch, "plan")
    # Rows of up to 32 tokens are short; the backward takes those of up to 128 whole.
    most = {"attention_forward": 32, "attention_grad_queries": 128, "attention_grad_keys": 128}
    for kernel, left_out in most.items():
        tiles = sum(-(-int(length) // 64) for length in lengths if length > left_out)
        assert searched[kernel].live == planned[kernel].grid == planned[kernel].live == 4 * tiles
        assert searched[kernel].grid == 4 * (int(lengths.sum()) // 64 + 10)
    # Two rows to a program of short rows: pairs 0, 1 and 2, 3 and 4, 5 and 6, 7 have a short one, row 8 is not.
    assert searched["attention_forward_short"][1:3] == (20, 16)


def test_kernels_without_work_are_left_out() -> None:
    all_short = _by_kernel(Batch("", torch.full((3000,), 7), 2, 32), "plan")
    assert set(all_short) == {"attention_forward_short", "attention_backward_short"}
    all_whole = _by_kernel(Batch("", torch.full((30,), 60), 2, 32), "plan")
    assert "attention_backward_whole" in all_whole
    assert not {"attention_backward_short", "attention_grad_queries", "attention_grad_keys"} & set(all_whole)
    no_short = _by_kernel(Batch("", torch.full((30,), 100), 2, 32), "plan")
    assert not [kernel for kernel in no_short if kernel.endswith("_short")]


def test_tiny_rows_start_few_idle_programs() -> None:
    batch = programs.BATCHES[0]
    for kernel in ("attention_forward", "attention_grad_queries", "attention_grad_keys"):
        assert _by_kernel(batch, "search")[kernel].idle > 150_000
        assert _by_kernel(batch, "call")[kernel].idle < 5000
        assert kernel not in _by_kernel(batch, "plan")


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.main(["--lengths", "3x40,2x5", "--heads", "2", "--way", "list", "--grids"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[-6:] == ["attention_forward", "16", "6", "10", "63", "%"] for line in lines), lines
