"""The rows that memory or short rows bound: their batches, shares and verdicts, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from interformer_bench import quiet, shapes, timing, workloads
from interformer_bench.rows import lines, measure, tables
from interformer_bench.rows.__main__ import main
from interformer_bench.rows.lines import Wanted
from interformer_bench.rows.measure import RowMeasurement

ALL = {line.name: line for line in lines.lines(shapes.length_distributions(Path("nowhere")))}
QUIET, BUSY = quiet.Quietness(2, 1.0, 0.0, 2e-5, 1e-5), quiet.Quietness(2, 0.5, 0.0, 2e-5, 1e-5)


def test_every_dtype_gets_the_same_rows_and_memory_is_filled_in_float32() -> None:
    line, memory = ALL["1 query, rows of 30-100"], 40 << 20
    (lengths, wide), (narrow_lengths, narrow) = (line.batch(dtype, memory) for dtype in ("float32", "bfloat16"))
    assert lengths == narrow_lengths
    assert min(lengths) >= 30
    assert max(lengths) <= 100
    assert len(wide["k"]) == len(narrow["k"]) == sum(lengths)
    assert memory <= sum(wide[name].nbytes for name in "qkv") < 2 * memory
    assert wide["kv_offsets"].diff().tolist() == list(lengths)


@pytest.mark.parametrize("name", ["4 seeds, rows of 2-9, backward", "folded, diginetica"])
def test_repeated_rows_are_rows_of_the_op(name: str) -> None:
    line = ALL[name]
    lengths, arguments = line.batch("float64", 20 << 20)
    out = workloads.training(line.op, workloads.ours(line.op), arguments)["out"]
    assert len(out) == len(lengths)
    half = len(lengths) // 2
    if lengths[:half] == lengths[half:]:
        assert torch.equal(out[:half], out[half:])


def timed(dtype: str, seconds: float, **more: Any) -> RowMeasurement:
    given: dict[str, Any] = {"flops": 10**9, "bytes": 10**9, "copied": 10**9, "copy": 2e9, "gemm": 10e9, **more}
    return RowMeasurement(
        "1 query", "pma_pooling", dtype, 2, 10, 100, time=timing.Timing(seconds, seconds, seconds, 3), **given
    )


def test_shares_and_speeds_are_judged() -> None:
    wanted = Wanted({"float32": 0.6, "bfloat16": 0.6}, speed={"bfloat16": (1.6, "float32")})
    measured = [timed("float32", 1.0), timed("bfloat16", 0.8)]  # a copy takes half a second
    assert tables.judged(measured[0], wanted, {}) == [">= 0.6 of nearer limit: 0.50 MISS"]
    speeds = {"float32": tables.speed(measured[1], measured[0])}
    texts = tables.judged(measured[1], wanted, speeds)
    assert texts == [">= 0.6 of nearer limit: 0.62 pass", ">= 1.6x float32: 1.25 MISS"]
    assert tables.judged(measured[0], Wanted({"float32": 0.1}, lines.GEMM), {}) == [">= 0.1 of GEMM: 0.10 pass"]


def test_a_busy_machine_has_no_shares() -> None:
    reason = "a thread got 0.50 of a processor"
    busy, wide = timed("bfloat16", 0.8, busy=reason), timed("float32", 1.0)
    row = tables._row(busy, Wanted({"bfloat16": 0.1}), {(m.line, m.dtype): m for m in (busy, wide)})
    assert row[-3:] == (quiet.NO_RATIO, "-", reason)
    assert tables.speed(wide, busy) is None


@pytest.mark.parametrize("checked", [QUIET, BUSY], ids=["quiet", "busy"])
def test_the_command_measures_prints_and_writes(
    checked: quiet.Quietness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(quiet, "check", lambda threads: checked)
    monkeypatch.setattr(timing, "_GEMM_SIZES", (64,))
    monkeypatch.setattr(timing, "_COPY_BYTES", 1 << 16)
    chosen = ["--line", "1 query, rows of 30", "--seconds", "0", "--memory", "1", "--threads", "1"]
    before = torch.get_num_threads()
    try:
        assert main([*chosen, "--dtype", "float32", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert ("of nearer limit: " in printed) == (checked is QUIET)
    assert (quiet.NO_RATIO in printed) == (checked is BUSY)
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [line["line"] for line in written["lines"]] == ["1 query, rows of 30-100"]
    assert printed.splitlines()[0] in (tmp_path / "rows.md").read_text()
    assert main(["--line", "nonsense"]) == 2
    assert "--line must be part of one of: 1 query, rows of 30-100; " in capsys.readouterr().err


def test_float16_is_held_to_the_product_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[torch.dtype] = []
    machine = timing.Machine(tiny=True)
    sample = machine.sample
    monkeypatch.setattr(machine, "sample", lambda dtype: sampled.append(dtype) or sample(dtype))
    line = ALL["folded, diginetica"]
    measured = measure._measured(line, "float16", 0, 0.0, machine, None)
    assert sampled == [torch.float32]
    assert measured.problem is None
    assert measured.gemm == machine.rates()["float32", torch.get_num_threads()].gemm
