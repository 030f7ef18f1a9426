"""The GPU's bench: its command, jobs and tables, rehearsed on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_stand_in import REHEARSAL, Record
from interformer_bench import gpu, gpu_jobs, gpu_measure, gpu_tables, run
from interformer_bench.peers import OURS, on_gpu
from interformer_bench.workloads import Sizes

from interformer_kernels import testing

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
TINY = ("--device", "cpu", "--tiny")


def read(file: Path) -> list[Record]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---------------------------------------------------------------- the command


@needs_no_gpu
def test_it_says_that_it_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--results", str(tmp_path / "results.jsonl")])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.endswith("interformer_bench.gpu: needs a GPU that torch can use, found none\n")
    assert not list(tmp_path.iterdir())


def test_the_list_tells_the_jobs_in_order_of_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert listed[0] == {"name": "ceilings", "part": 1, "seconds": 10.0, "kind": "ceiling", "compiled": False}
    assert [record["part"] for record in listed] == sorted(record["part"] for record in listed)
    assert len({record["name"] for record in listed}) == len(listed)
    part_1 = [record["name"] for record in listed if record["part"] == 1]
    assert {"jagged-104-d16-bf16", "jagged-104-d64-bf16", "pma-104-bf16", "jagged-tiny-bf16"} <= set(part_1)
    assert {"jagged-1000-d64-bf16", "jagged-4096-d64-bf16", "pma-4096-bf16", "pma-1000-m32-bf16"} <= set(part_1)
    assert sum(record["seconds"] for record in listed if record["part"] == 1) <= 180
    assert gpu.main(["--list", "--compiled"]) == 0
    with_compiled = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert with_compiled[: len(listed)] == listed
    assert all(record["compiled"] and record["part"] == 2 for record in with_compiled[len(listed) :])


def test_shapes_are_those_of_models() -> None:
    shapes = {job.name: job.shape for job in gpu_jobs.jobs() if job.shape is not None}
    assert {shape.op for shape in shapes.values()} == set(testing.OPS)
    assert max(shapes["jagged-tiny-bf16"].lengths()) == 32
    assert set(shapes["jagged-4096-d64-fp32"].lengths()) == {4096}
    assert max(shapes["jagged-1000-d64-bf16"].lengths()) <= 1000
    assert shapes["pma-1000-m192-bf16"].sizes == Sizes(4, 128, 192)


@pytest.mark.parametrize("arguments", [["--only", "nothing", *TINY], [], ["--results", "x", "--backend", "cpu"]])
def test_what_cannot_be_done_is_said_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert "wanted" in (message := capsys.readouterr().err) or "invalid choice" in message


def test_a_rehearsal_has_a_record_of_every_runner_and_says_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "made" / "results.jsonl"
    chosen = ["--only", "pma-104-bf16", "--only", "ceilings", "--backend", "triton", "--results", str(file), *TINY]
    assert gpu.main(chosen) == 0
    records = read(file)
    assert {record["kind"] for record in records} == {"ceiling", "bench"}
    assert all(record["tiny"] and record["device"] == "cpu" for record in records)
    bench = [record for record in records if record["kind"] == "bench"]
    assert {record["step"] for record in bench} == {"pma-104-bf16"}
    assert {record["sets"] for record in bench if record["median"] is not None} == {gpu_measure.SETS}
    runners = {record["runner"] for record in bench}
    assert {OURS, *on_gpu.FULL, "varlen_attn", "varlen_attn, longest known", "padded SDPA", "nested SDPA"} < runners
    ours = [record for record in bench if record["runner"] == OURS]
    assert [(record["backend"], record["pass"]) for record in ours] == [
        ("triton", direction) for direction in run.PASSES
    ]
    assert all(record["median"] > 0 and record["problem"] is None and record["stand_in"] == "cpu" for record in ours)
    # A peer that needs a GPU has a record with its failure.
    varlen = [record for record in bench if record["runner"] == "varlen_attn"]
    assert all(record["median"] is None and record["problem"].startswith("failed: ") for record in varlen)
    text = gpu_tables.tables(records)
    assert "A rehearsal" in text
    assert "varlen_attn: failed" in text


@pytest.mark.parametrize("op", testing.OPS)
def test_every_op_has_a_job_that_can_be_rehearsed(op: str) -> None:
    chosen = next(job for job in gpu_jobs.jobs(tiny=True) if job.shape is not None and job.shape.op == op)
    written: list[Record] = []
    assert gpu_measure.measure(replace(chosen, dtype="float32"), ["cuda"], REHEARSAL, written.append)
    right = {job["runner"] for job in written if job["median"] is not None}
    assert OURS in right
    assert len(right) >= 2


# ---------------------------------------------------------------- tables


def bench_record(runner: str, median: float | None, graph: float | None = None, **fields: Any) -> Record:
    return {
        "kind": "bench", "step": "pma-104-bf16", "op": "pma_pooling", "law": "all 104", "rows": 2, "tokens": 208,
        "longest": 104, "sizes": "H4", "dtype": "bfloat16", "pass": "forward", "runner": runner,
        "backend": "triton" if runner == OURS else "torch", "median": median, "samples": 9, "spread": 0.1,
        "graph": graph, "graph_problem": None, "flops": 10**9, "bytes": 10**9, "wanted": 3.0, "peak": 2**20,
        "problem": None, "tiny": False, "device": "cuda", **fields,
    }  # fmt: skip


def test_tables_hold_ours_against_the_fastest_right_peer() -> None:
    ceiling = {"kind": "ceiling", "step": "ceilings", "dtype": "bfloat16", "gemm": 1e14, "copy": 4e12, "size": 8192,
               "copied": 2**32, "gemm_spread": 0.01, "copy_spread": 0.02}  # fmt: skip
    records = [
        ceiling,
        bench_record(OURS, 9e-3),
        bench_record("slow", 5e-3, 4e-3),
        bench_record("fast", 2e-3, graph_problem="waits for the device"),
        bench_record("wrong", None, problem="wrong out: 99 of its budget, 10 allowed"),
        bench_record(OURS, 1e-3, 5e-4),  # takes the first one's place
    ]
    (row,) = gpu_tables.ratios(gpu_tables._latest(records[1:]), {"bfloat16": ceiling})
    assert row[4:] == (
        *("triton", "1 ms", "2 ms (fast)", "2.00x", "500 us", "4 ms (slow)", "8.00x", "50% copy", ">= 3x pass"),
    )
    text = gpu_tables.tables(records)
    assert "| bfloat16 | 100 TFLOP/s (8192^3) | 1% | 4000 GB/s (4 GiB) | 2% |" in text
    assert "- wrong: wrong out: 99 of its budget, 10 allowed (pma-104-bf16, forward)" in text
    assert "rehearsal" not in text
    assert text.count(f"| {OURS} (triton) |") == 1
    assert gpu_tables.tables([]) == ""


def test_records_that_make_no_sense_are_counted_and_the_others_told() -> None:
    right = [bench_record(OURS, 1e-3), bench_record("peer", 2e-3)]
    invalid = [
        {**right[0], key: value} for key, value in (("median", "fast"), ("step", 7), ("rows", None), ("runner", []))
    ]
    invalid += [{"kind": "bench"}, {"kind": "check", "ok": False}, {"kind": "ceiling", "gemm": 0}, {"kind": "failed"}]
    text = gpu_tables.tables([*invalid, {"kind": "parity", "anything": 1}, *right])
    assert "- 8 records that make no sense" in text
    assert "2 ms (peer) | 2.00x" in text
    assert "make no sense" not in gpu_tables.tables([{"kind": "parity"}, *right])
    assert "- 1 records that make no sense" in gpu_tables.tables(["nonsense"])  # type: ignore[list-item]


def test_checks_that_found_something_are_in_the_tables() -> None:
    finding = {"kind": "check", "step": "large-batch.pma_pooling", "backend": "cuda", "what": "rows alone", "row": 7,
           "dtype": "float32", "problem": "out[7] is 1, wanted 2", "tiny": False, "device": "cuda"}  # fmt: skip
    text = gpu_tables.tables([{**finding, "ok": False}, {**finding, "ok": True}, {**finding, "ok": None}])
    assert "| large-batch.pma_pooling | cuda | 3 | 1 | 1 | 1 |" in text
    assert "- large-batch.pma_pooling (cuda), rows alone, float32, row 7: out[7] is 1, wanted 2" in text
