"""The command of the GPU checks, and its comparison of bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_faults import OPS, PLACE, Outputs, counted, served
from interformer_bench import gpu_checks
from interformer_bench.check_context import CheckContext, Inputs, difference, row_at, same_bits, within_budget
from interformer_bench.gpu_place import Place

# ---------------------------------------------------------------- bits


def test_bits_are_compared_and_the_first_difference_is_told() -> None:
    x = torch.randn(7, 2, 3)
    assert difference(x, x.clone()) == (None, 0)
    y = x.clone()
    y[4, 1, 2] += 1
    y[6, 0, 0] = torch.nan
    assert difference(y, x) == ((4, 1, 2), 2)
    assert difference(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -0.0])) == ((1,), 1)
    assert difference(y.mT, y.mT.contiguous()) == (None, 0)  # NaN, too
    assert difference(torch.empty(0, 3), torch.empty(0, 3)) == (None, 0)
    assert difference(torch.tensor(1.0), torch.tensor(2.0)) == ((), 1)
    finding = same_bits("x", torch.float32, {"out": y}, {"out": x}, (3, 0, 4))
    assert (finding.ok, finding.quantity, finding.index, finding.row) == (False, "out", (4, 1, 2), 2)
    assert same_bits("x", torch.float32, {"out": x}, {"out": x.double()}).ok is False
    assert same_bits("x", torch.float32, {"out": x}, {"out": x[:6]}).ok is False
    assert (row_at(3, 7, (3, 0, 4)), row_at(2, 3, (3, 0, 4)), row_at(0, 5, (3, 0, 4))) == (2, 2, None)


def test_differences_are_found_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interformer_bench.check_context._COMPARED_AT_ONCE", 4)
    x = torch.zeros(3, 5, dtype=torch.bfloat16)
    y = x.clone()
    y[1, 4] = y[2, 1] = 1
    assert difference(x, y) == ((1, 4), 2)


def test_too_few_numbers_are_not_judged() -> None:
    short, long = torch.randn(8), torch.randn(2000)
    finding = within_budget("x", torch.float32, {"out": short}, {"out": short}, {"out": short.double() + 1})
    assert finding.ok is None
    finding = within_budget("x", torch.float32, {"out": long}, {"out": long}, {"out": long.double() + 1})
    assert finding.ok is True  # eager errs as much
    assert within_budget("x", torch.float32, {"out": long + 9}, {"out": long}, {"out": long.double()}).ok is False


# ---------------------------------------------------------------- the command


def test_the_list_tells_every_check_of_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_checks.main(["--list"]) == 0
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(listed) == (len(gpu_checks.KINDS) - 1) * len(OPS) + 1  # one is of a whole model
    assert listed[0] == {"name": f"large-batch.{OPS[0]}", "part": 1, "seconds": 12, "kind": "check"}
    assert [check["part"] for check in listed] == sorted(check["part"] for check in listed)


def test_findings_are_lines_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.jsonl"
    chosen = ["--results", str(file), "--device", "cpu", "--tiny", "--backend", "cuda"]
    assert gpu_checks.main(["--only", "index-views.pma_pooling", "--only", "autocast", *chosen]) == 0
    findings = [json.loads(line) for line in file.read_text().splitlines()]
    assert {finding["step"] for finding in findings} == {"index-views.pma_pooling", *(f"autocast.{op}" for op in OPS)}
    assert all(
        finding["ok"] and finding["kind"] == "check" and finding["backend"] == "cuda" and finding["tiny"]
        for finding in findings
    )

    def faulty(place: Place, op: str, backend: str) -> CheckContext:
        return CheckContext(place, op, backend, counted(lambda call, out: out + call))

    monkeypatch.setattr(CheckContext, "of", faulty)
    assert gpu_checks.main(["--only", "side-stream.apply_rotary", *chosen]) == 1
    last = json.loads(file.read_text().splitlines()[-1])
    assert (last["ok"], last["what"], last["quantity"], last["device"]) == (False, "beside a busy stream", "out", "cpu")


def test_a_check_that_raises_is_a_finding_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(op: str, inputs: Inputs) -> Outputs:
        if op == "pma_pooling":
            raise RuntimeError("an illegal memory access was encountered")
        return served(op, inputs)

    monkeypatch.setattr(CheckContext, "of", lambda place, op, backend: CheckContext(place, op, backend, raising))
    file = tmp_path / "results.jsonl"
    chosen = ["--results", str(file), "--device", "cpu", "--tiny", "--backend", "triton"]
    assert gpu_checks.main(["--only", "side-stream", *chosen]) == 1
    findings = [json.loads(line) for line in file.read_text().splitlines()]
    (wrong,) = (finding for finding in findings if not finding["ok"])
    assert (wrong["step"], wrong["what"]) == ("side-stream.pma_pooling", "runs")
    assert wrong["problem"] == "failed: RuntimeError: an illegal memory access was encountered"
    assert {finding["step"] for finding in findings} == {f"side-stream.{op}" for op in OPS}


def test_a_lost_gpu_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "is_lost", lambda self: True)
    file = tmp_path / "results.jsonl"
    assert gpu_checks.main(["--only", "side-stream", "--results", str(file), "--device", "cpu", "--tiny"]) == 1
    findings = [json.loads(line) for line in file.read_text().splitlines()]
    assert findings[-1]["kind"] == "failed"
    assert {finding["step"] for finding in findings} == {f"side-stream.{OPS[0]}"}


def test_a_backend_that_cannot_serve_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interformer_kernels._backend.unsupported_reason", lambda *_: "it was not built")
    written: list[dict[str, Any]] = []
    assert not gpu_checks.check(
        "side-stream.pma_pooling", CheckContext(PLACE, "pma_pooling", "cuda", served), written.append
    )
    assert [(finding["ok"], finding["problem"]) for finding in written] == [(False, "cannot serve: it was not built")]


@pytest.mark.parametrize("arguments", [["--only", "nothing", "--results", "x"], []])
def test_what_cannot_be_asked_is_said_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_checks.main(arguments)
    assert stopped.value.code == 2
