"""Runners of the GPU's bench that are wrong or fail: they are recorded and enter no ratio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gpu_stand_in
import pytest
import torch
from gpu_stand_in import REHEARSAL, Record, rehearsal_job
from interformer_bench import checks, gpu_measure, gpu_place, gpu_tables, run, workloads
from interformer_bench.peers import OURS, Peer, registry
from interformer_bench.workloads import Sizes


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> gpu_stand_in.FakeGpu:
    return gpu_stand_in.install(monkeypatch)


def spoiled(
    call: Callable[..., torch.Tensor], condition: Callable[[torch.Tensor], bool]
) -> Callable[..., torch.Tensor]:
    """Add a hundredth to outputs that fulfil a condition."""

    def run(**arguments: Any) -> torch.Tensor:
        out = call(**arguments)
        return out + 0.01 if condition(out) else out

    return run


def measured(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[str, Any], Any]) -> tuple[bool, list[Record]]:
    """The records of a job whose runners are replaced by `spoil(name, call)`."""
    real_peers, real_runner, written = registry.gpu_peers, workloads.ours, []

    def spoiled_peers(*arguments: Any) -> dict[str, Peer]:
        return {name: replace(peer, run=spoil(name, peer.run)) for name, peer in real_peers(*arguments).items()}

    monkeypatch.setattr(gpu_measure, "gpu_peers", spoiled_peers)
    monkeypatch.setattr(workloads, "ours", lambda *arguments: spoil(OURS, real_runner(*arguments)))
    chosen = replace(rehearsal_job("jagged-tiny-bf16"), dtype="float32")
    right = gpu_measure.measure(chosen, ["triton"], REHEARSAL, written.append)
    return right, written


@pytest.mark.parametrize("faulty", [OURS, "padded SDPA"])
@pytest.mark.parametrize("batch", ["small", "whole"])
def test_a_wrong_runner_is_a_record_of_its_own(monkeypatch: pytest.MonkeyPatch, faulty: str, batch: str) -> None:
    tokens = sum(rehearsal_job("jagged-tiny-bf16").shape.lengths())  # type: ignore[union-attr]
    right, records = measured(
        monkeypatch,
        lambda name, call: (
            spoiled(call, lambda out: (len(out) == tokens) == (batch == "whole")) if name == faulty else call
        ),
    )
    assert right == (faulty != OURS)
    wrong = [record for record in records if record["runner"] == faulty]
    assert [record["pass"] for record in wrong] == [*run.PASSES] * (2 if faulty == OURS else 1)
    assert all(record["problem"].startswith("wrong out: ") for record in wrong)
    assert all(record["problem"].endswith("in the whole batch") == (batch == "whole") for record in wrong)
    # Wrong results of this package are timed, those of a peer are not.
    assert [record["median"] is not None for record in wrong] == (
        [False] * 2 + [True] * 2 if faulty == OURS else [False] * 2
    )
    lines = gpu_tables.ratios([{**record, "tiny": False} for record in records], {})
    assert all(faulty not in " ".join(line) for line in lines) if faulty != OURS else lines == []
    sections = gpu_tables.tables([{**record, "tiny": True} for record in records]).split(
        "## Wrong" if faulty == OURS else "## Not timed"
    )
    assert f"- {f'jagged-tiny-bf16 (triton), {run.PASSES[0]}' if faulty == OURS else faulty}: " in sections[1]


def test_a_runner_that_fails_does_not_keep_others_from_being_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str, call: Any) -> Any:
        def run(**arguments: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")

        return run if name == OURS else call

    right, records = measured(monkeypatch, failing)
    assert not right
    ours = [record for record in records if record["runner"] == OURS]
    assert {record["problem"] for record in ours} == {
        "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB."
    }
    assert any(record["median"] for record in records)


def test_a_runner_that_fails_while_it_is_timed_is_told_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"padded SDPA": 0}
    tokens = sum(rehearsal_job("jagged-tiny-bf16").shape.lengths())  # type: ignore[union-attr]

    def failing(name: str, call: Any) -> Any:
        def run(**arguments: Any) -> torch.Tensor:
            calls[name] += len(arguments["q"]) == tokens
            if calls[name] > 2 + gpu_measure.SETS + 1:  # two checks, a call on each set, and one that is timed
                raise torch.OutOfMemoryError("out of memory")
            return call(**arguments)

        return run if name in calls else call

    right, records = measured(monkeypatch, failing)
    assert right
    failures = [record for record in records if record["runner"] == "padded SDPA"]
    assert {record["problem"] for record in failures} == {"failed: OutOfMemoryError: out of memory"}
    assert [record["pass"] for record in failures] == list(run.PASSES)
    assert sum(record["median"] is not None for record in records if record["runner"] == OURS) == 2


def test_a_lost_gpu_ends_the_job_and_nobody_else_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []
    monkeypatch.setattr(gpu_place.Place, "is_lost", lambda self: bool(lost))

    def losing(name: str, call: Any) -> Any:
        def run(**arguments: Any) -> torch.Tensor:
            lost.append(name)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return run if name == OURS else call

    right, records = measured(monkeypatch, losing)
    assert not right
    assert {record["runner"] for record in records[:-1]} == {OURS}
    assert records[-1]["problem"] == f"RuntimeError: the GPU no longer responds since {OURS} (triton) ran"


def test_a_capture_that_fails_is_a_reason_and_gives_the_stream_back(fake: gpu_stand_in.FakeGpu) -> None:
    def failing() -> None:
        if "begin Graph" in fake.requests:
            raise RuntimeError("operation not permitted when stream is capturing")

    session = gpu_measure.Session(rehearsal_job("pma-tiny-bf16"), [], gpu_stand_in.Stand(), lambda record: None)
    session.sets = [{}]
    runner = gpu_measure.Runner("peer", "torch", Peer(lambda **_: failing()))  # type: ignore[arg-type, return-value]
    times = session._graph(runner, run.PASSES[0])
    assert times["graph"] is None
    assert times["graph_problem"].startswith("failed: RuntimeError: operation not permitted")
    assert fake.requests[-1] == "set_stream"


def test_what_ends_a_job_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_measure.Session, "_inputs", lambda self: (_ for _ in ()).throw(RuntimeError("no room")))
    right, records = measured(monkeypatch, lambda name, call: call)
    assert not right
    assert records[-1] == {"kind": "failed", "step": "jagged-tiny-bf16", "problem": "RuntimeError: no room"}
    assert "jagged-tiny-bf16: RuntimeError: no room" in gpu_tables.tables(records)


def test_a_named_backend_that_cannot_serve_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_place._backend, "unsupported_reason", lambda *_: "it was not built")
    right, records = measured(monkeypatch, lambda name, call: call)
    assert not right
    assert {record["problem"] for record in records if record["runner"] == OURS} == {"cannot serve: it was not built"}


def test_rows_of_the_whole_batch_are_cut_as_they_are_alone() -> None:
    lengths = (3, 0, 5, 1)
    for op, sizes in (
        ("gated_cross_attention", Sizes(2, 8, 3, gated=True)),
        ("personalized_ffn", Sizes(1, 8, width=6)),
    ):
        batch = workloads.inputs(op, lengths, sizes, torch.float32)
        some_rows = checks.call_on_rows(batch, lengths, [0, 2])
        whole, part = (workloads.training(op, workloads.ours(op), x) for x in (batch, some_rows))
        for name, x in part.items():
            assert torch.equal(x, checks.select_rows(whole[name], lengths, [0, 2])), name
    assert checks.sample_rows(lengths, 2, max_rows=2) == [2, 3]
    assert checks.sample_rows((4096,) * 9, 8) != checks.sample_rows((64,) * 9, 8) == list(range(9))
    assert len(checks.sample_rows((10**6,), 8)) == 1  # one at least
