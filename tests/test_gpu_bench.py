"""The GPU's bench: its jobs, its timing, its peers, its records and tables; by stand-ins where it needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_stand_in
import pytest
import torch
from interformer_bench import checks, gpu, gpu_jobs, gpu_measure, gpu_place, gpu_tables, run, timing, workloads
from interformer_bench.peers import OURS, Peer, on_gpu, registry
from interformer_bench.workloads import Sizes

from interformer_kernels import testing
from interformer_kernels.testing import inputs as drawing

Record = dict[str, Any]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
TINY = ("--device", "cpu", "--tiny")
REHEARSAL = gpu_place.Place("cpu", tiny=True)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> gpu_stand_in.FakeGpu:
    return gpu_stand_in.install(monkeypatch)


def job(name: str, tiny: bool = True) -> gpu_jobs.Job:
    return next(one for one in gpu_jobs.jobs(tiny=tiny) if one.name == name)


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
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[0] == {"name": "ceilings", "part": 1, "seconds": 10.0, "kind": "ceiling", "compiled": False}
    assert [one["part"] for one in found] == sorted(one["part"] for one in found)
    assert len({one["name"] for one in found}) == len(found)
    first = [one["name"] for one in found if one["part"] == 1]
    assert {"jagged-104-d16-bf16", "jagged-104-d64-bf16", "pma-104-bf16", "jagged-tiny-bf16"} <= set(first)
    assert {"jagged-1000-d64-bf16", "jagged-4096-d64-bf16", "pma-4096-bf16", "pma-1000-m32-bf16"} <= set(first)
    assert sum(one["seconds"] for one in found if one["part"] == 1) <= 180
    assert gpu.main(["--list", "--compiled"]) == 0
    more = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert more[: len(found)] == found
    assert all(one["compiled"] and one["part"] == 2 for one in more[len(found) :])


def test_shapes_are_those_of_models() -> None:
    found = {one.name: one.shape for one in gpu_jobs.jobs() if one.shape is not None}
    assert {shape.op for shape in found.values()} == set(testing.OPS)
    assert max(found["jagged-tiny-bf16"].lengths()) == 32
    assert set(found["jagged-4096-d64-fp32"].lengths()) == {4096}
    assert max(found["jagged-1000-d64-bf16"].lengths()) <= 1000
    assert found["pma-1000-m192-bf16"].sizes == Sizes(4, 128, 192)


@pytest.mark.parametrize("arguments", [["--only", "nothing", *TINY], [], ["--results", "x", "--backend", "cpu"]])
def test_what_cannot_be_done_is_said_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert "wanted" in (said := capsys.readouterr().err) or "invalid choice" in said


def test_a_rehearsal_has_a_record_of_every_runner_and_says_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "made" / "results.jsonl"
    chosen = ["--only", "pma-104-bf16", "--only", "ceilings", "--backend", "triton", "--results", str(file), *TINY]
    assert gpu.main(chosen) == 0
    found = read(file)
    assert {one["kind"] for one in found} == {"ceiling", "bench"}
    assert all(one["tiny"] and one["device"] == "cpu" for one in found)
    bench = [one for one in found if one["kind"] == "bench"]
    assert {one["step"] for one in bench} == {"pma-104-bf16"}
    assert {one["sets"] for one in bench if one["median"] is not None} == {gpu_measure.SETS}
    runners = {one["runner"] for one in bench}
    assert {OURS, *on_gpu.FULL, "varlen_attn", "varlen_attn, longest known", "padded SDPA", "nested SDPA"} < runners
    ours = [one for one in bench if one["runner"] == OURS]
    assert [(one["backend"], one["pass"]) for one in ours] == [("triton", direction) for direction in run.PASSES]
    assert all(one["median"] > 0 and one["problem"] is None and one["stand_in"] == "cpu" for one in ours)
    # What a CPU has not is a record of its own.
    varlen = [one for one in bench if one["runner"] == "varlen_attn"]
    assert all(one["median"] is None and one["problem"].startswith("failed: ") for one in varlen)
    text = gpu_tables.tables(found)
    assert "A rehearsal" in text
    assert "varlen_attn: failed" in text


@pytest.mark.parametrize("op", testing.OPS)
def test_every_op_has_a_job_that_can_be_rehearsed(op: str) -> None:
    chosen = next(one for one in gpu_jobs.jobs(tiny=True) if one.shape is not None and one.shape.op == op)
    written: list[Record] = []
    assert gpu_measure.measure(replace(chosen, dtype="float32"), ["cuda"], REHEARSAL, written.append)
    right = {one["runner"] for one in written if one["median"] is not None}
    assert OURS in right
    assert len(right) >= 2


# ---------------------------------------------------------------- what is wrong is told, and is in no ratio


def spoiled(call: Callable[..., torch.Tensor], where: Callable[[torch.Tensor], bool]) -> Callable[..., torch.Tensor]:
    """Adds a hundredth to what is returned, where the output is as said."""

    def run(**arguments: Any) -> torch.Tensor:
        out = call(**arguments)
        return out + 0.01 if where(out) else out

    return run


def measured(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[str, Any], Any]) -> tuple[bool, list[Record]]:
    """The records of a job, whose runners went through `spoil(name, call)`."""
    peers, ours, written = on_gpu.gpu_peers, workloads.ours, []

    def spoiled_peers(*arguments: Any) -> dict[str, Peer]:
        return {name: replace(peer, run=spoil(name, peer.run)) for name, peer in peers(*arguments).items()}

    monkeypatch.setattr(gpu_measure, "gpu_peers", spoiled_peers)
    monkeypatch.setattr(workloads, "ours", lambda *arguments: spoil(OURS, ours(*arguments)))
    chosen = replace(job("jagged-tiny-bf16"), dtype="float32")
    right = gpu_measure.measure(chosen, ["triton"], REHEARSAL, written.append)
    return right, written


@pytest.mark.parametrize("who", [OURS, "padded SDPA"])
@pytest.mark.parametrize("batch", ["small", "whole"])
def test_a_wrong_runner_is_a_record_of_its_own(monkeypatch: pytest.MonkeyPatch, who: str, batch: str) -> None:
    tokens = sum(job("jagged-tiny-bf16").shape.lengths())  # type: ignore[union-attr]
    right, found = measured(
        monkeypatch,
        lambda name, call: (
            spoiled(call, lambda out: (len(out) == tokens) == (batch == "whole")) if name == who else call
        ),
    )
    assert right == (who != OURS)
    wrong = [one for one in found if one["runner"] == who]
    assert [one["pass"] for one in wrong] == [*run.PASSES] * (2 if who == OURS else 1)
    assert all(one["problem"].startswith("wrong out: ") for one in wrong)
    assert all(one["problem"].endswith("in the whole batch") == (batch == "whole") for one in wrong)
    # How fast this package was wrong is told; a peer is not timed.
    assert [one["median"] is not None for one in wrong] == ([False] * 2 + [True] * 2 if who == OURS else [False] * 2)
    lines = gpu_tables.ratios([{**one, "tiny": False} for one in found], {})
    assert all(who not in " ".join(line) for line in lines) if who != OURS else lines == []
    said = gpu_tables.tables([{**one, "tiny": True} for one in found]).split(
        "## Wrong" if who == OURS else "## Not timed"
    )
    assert f"- {f'jagged-tiny-bf16 (triton), {run.PASSES[0]}' if who == OURS else who}: " in said[1]


def test_a_runner_that_fails_does_not_keep_others_from_being_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(name: str, call: Any) -> Any:
        def run(**arguments: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")

        return run if name == OURS else call

    right, found = measured(monkeypatch, failing)
    assert not right
    ours = [one for one in found if one["runner"] == OURS]
    assert {one["problem"] for one in ours} == {
        "failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB."
    }
    assert any(one["median"] for one in found)


def test_a_runner_that_fails_while_it_is_timed_is_told_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"padded SDPA": 0}
    tokens = sum(job("jagged-tiny-bf16").shape.lengths())  # type: ignore[union-attr]

    def failing(name: str, call: Any) -> Any:
        def run(**arguments: Any) -> torch.Tensor:
            calls[name] += len(arguments["q"]) == tokens
            if calls[name] > 2 + gpu_measure.SETS + 1:  # two checks, a call on each set, and one that is timed
                raise torch.OutOfMemoryError("out of memory")
            return call(**arguments)

        return run if name in calls else call

    right, found = measured(monkeypatch, failing)
    assert right
    told = [one for one in found if one["runner"] == "padded SDPA"]
    assert {one["problem"] for one in told} == {"failed: OutOfMemoryError: out of memory"}
    assert [one["pass"] for one in told] == list(run.PASSES)
    assert sum(one["median"] is not None for one in found if one["runner"] == OURS) == 2


def test_a_lost_gpu_ends_the_job_and_nobody_else_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[str] = []
    monkeypatch.setattr(gpu_place.Place, "is_lost", lambda self: bool(lost))

    def losing(name: str, call: Any) -> Any:
        def run(**arguments: Any) -> torch.Tensor:
            lost.append(name)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return run if name == OURS else call

    right, found = measured(monkeypatch, losing)
    assert not right
    assert {one["runner"] for one in found[:-1]} == {OURS}
    assert found[-1]["problem"] == f"RuntimeError: the GPU no longer responds since {OURS} (triton) ran"


def test_a_capture_that_fails_is_a_reason_and_gives_the_stream_back(fake: gpu_stand_in.FakeGpu) -> None:
    def failing() -> None:
        if "begin Graph" in fake.asked:
            raise RuntimeError("operation not permitted when stream is capturing")

    session = gpu_measure.Session(job("pma-tiny-bf16"), [], gpu_stand_in.Stand(), lambda record: None)
    session.sets = [{}]
    one = gpu_measure.Runner("peer", "torch", Peer(lambda **_: failing()))  # type: ignore[arg-type, return-value]
    found = session._graph(one, run.PASSES[0])
    assert found["graph"] is None
    assert found["graph_problem"].startswith("failed: RuntimeError: operation not permitted")
    assert fake.asked[-1] == "set_stream"


def test_what_ends_a_job_is_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_measure.Session, "_inputs", lambda self: (_ for _ in ()).throw(RuntimeError("no room")))
    right, found = measured(monkeypatch, lambda name, call: call)
    assert not right
    assert found[-1] == {"kind": "failed", "step": "jagged-tiny-bf16", "problem": "RuntimeError: no room"}
    assert "jagged-tiny-bf16: RuntimeError: no room" in gpu_tables.tables(found)


def test_a_named_backend_that_cannot_serve_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_place._backend, "why_not", lambda *_: "it was not built")
    right, found = measured(monkeypatch, lambda name, call: call)
    assert not right
    assert {one["problem"] for one in found if one["runner"] == OURS} == {"cannot serve: it was not built"}


def test_rows_of_the_whole_batch_are_cut_as_they_are_alone() -> None:
    lengths = (3, 0, 5, 1)
    for op, sizes in (
        ("gated_cross_attention", Sizes(2, 8, 3, gated=True)),
        ("personalized_ffn", Sizes(1, 8, width=6)),
    ):
        made = workloads.inputs(op, lengths, sizes, torch.float32)
        few = checks.call_on_rows(made, lengths, [0, 2])
        whole, part = (workloads.training(op, workloads.ours(op), x) for x in (made, few))
        for name, x in part.items():
            assert torch.equal(x, checks.select_rows(whole[name], lengths, [0, 2])), name
    assert checks.sample_rows(lengths, 2, max_rows=2) == [2, 3]
    assert checks.sample_rows((4096,) * 9, 8) != checks.sample_rows((64,) * 9, 8) == list(range(9))
    assert len(checks.sample_rows((10**6,), 8)) == 1  # one at least


# ---------------------------------------------------------------- peers


@pytest.mark.parametrize("op", testing.OPS)
@pytest.mark.parametrize("lengths", [(5, 1, 0, 33), (7, 7, 7)], ids=["ragged", "full"])
def test_peers_that_know_the_lengths_are_right(op: str, lengths: tuple[int, ...]) -> None:
    sizes = {"personalized_ffn": Sizes(1, 12, width=7)}.get(op, Sizes(2, 8, 2, gated=op == "gated_cross_attention"))
    found = on_gpu.gpu_peers(op, lengths)
    assert (set(on_gpu.FULL) <= set(found)) == (len(set(lengths)) == 1 and op in testing.OPS[:3])
    checker = checks.Checker(op, lengths, sizes, torch.float32)
    problems = {name: checker.check(name, peer).problem for name, peer in found.items()}
    needs_a_gpu = {"varlen_attn", "varlen_attn, longest known", "SDPA cuDNN, full rows"}
    assert {name for name, problem in problems.items() if problem} == needs_a_gpu & set(found)
    assert all("failed: " in str(problems[name]) for name in needs_a_gpu & set(found))


def test_a_full_row_peer_takes_the_kernel_it_is_named_for(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        taken.append(f"flash {torch._C._get_flash_sdp_enabled()}, cudnn {torch._C._get_cudnn_sdp_enabled()}")
        assert q.shape == k.shape == (2, 3, 4, 8)
        return v

    monkeypatch.setattr(on_gpu, "sdpa", sdpa)
    made = workloads.inputs("jagged_attention", (4, 4), Sizes(3, 8), torch.float32)
    for name in on_gpu.FULL:
        out = workloads.forward(on_gpu.gpu_peers("jagged_attention", (4, 4))[name].run, made)
        assert torch.equal(out, made["v"])
    assert taken == ["flash True, cudnn False", "flash False, cudnn True"]


@pytest.mark.parametrize("takes_scale", [True, False])
def test_varlen_attention_is_told_what_is_known(monkeypatch: pytest.MonkeyPatch, takes_scale: bool) -> None:
    from interformer_bench.peers import varlen
    from torch.nn.attention import varlen as theirs

    told: list[Any] = []

    def newer(q: Any, k: Any, v: Any, a: Any, b: Any, most_q: int, most_k: int, *, scale: Any = None) -> torch.Tensor:
        told.append((most_q, most_k, scale, a.dtype))
        return torch.zeros_like(q)

    def older(q: Any, k: Any, v: Any, a: Any, b: Any, most_q: int, most_k: int) -> torch.Tensor:
        return newer(q, k, v, a, b, most_q, most_k)

    monkeypatch.setattr(theirs, "varlen_attn", newer if takes_scale else older)
    varlen._takes_scale.cache_clear()
    q, offsets = torch.zeros(9, 2, 16), torch.tensor([0, 2, 9])
    scale = 0.25 if takes_scale else None
    varlen.attend_jagged(q, q, q, offsets, 0.25)
    varlen.attend_jagged(q, q, q, offsets, 0.25, longest=8)
    assert varlen.attend_dense(torch.zeros(2, 3, 2, 16), q, q, offsets, 0.25, longest=8).shape == (2, 3, 2, 16)
    assert told == [(most_q, most_k, scale, torch.int32) for most_q, most_k in ((7, 7), (8, 8), (3, 8))]
    if not takes_scale:
        with pytest.raises(TypeError):
            varlen.attend_jagged(q, q, q, offsets, 0.3)
    varlen._takes_scale.cache_clear()


def test_peers_of_a_gpu_may_take_half_of_its_free_memory(
    monkeypatch: pytest.MonkeyPatch, fake: gpu_stand_in.FakeGpu
) -> None:
    assert registry.max_peer_bytes("cuda:0") == 53 * 2**30  # 100 free, and 6 that torch keeps
    assert registry.max_peer_bytes("cpu") == 6 * 2**30
    monkeypatch.setattr(workloads, "key_offsets", lambda arguments: SimpleNamespace(device="cuda:0"))
    peer = SimpleNamespace(needs=lambda arguments: 40 * 2**30)
    assert run.too_large(peer, {}, run.PASSES[0]) is None  # type: ignore[arg-type]
    assert run.too_large(peer, {}, run.PASSES[1]) == "would allocate about 80 GiB"  # type: ignore[arg-type]


# ---------------------------------------------------------------- timing


def test_a_gpu_is_timed_by_what_it_works_not_by_launching(fake: gpu_stand_in.FakeGpu) -> None:
    def call() -> None:
        fake.launch(5.0)

    assert timing.once(call, "cuda", 4) == pytest.approx(5e-3)
    assert timing.quickest(call, "cuda") == pytest.approx(5e-3)
    assert timing.interleaved({"a": call}, "cuda", seconds=0.0)["a"].median == pytest.approx(5e-3)


def test_checks_time_runners_where_they_run(fake: gpu_stand_in.FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch takes no time: what is expected of a peer must come from the device."""
    checker = checks.Checker("pma_pooling", (3, 4), Sizes(2, 8, 2), torch.float32)
    ours = workloads.ours("pma_pooling")

    def peer(**arguments: Any) -> torch.Tensor:
        fake.launch(7000.0)
        return ours(**arguments)

    checker._truth(True)
    checker.device = "cuda"
    assert checker.check("peer", Peer(peer)).forward == pytest.approx(7.0)


def test_ceilings_of_a_gpu_are_of_many_large_random_products(
    fake: gpu_stand_in.FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("randn", "randint"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, device=None, real=real, **k: real(*a, **k))
    machine = timing.Machine("cuda")
    assert machine._sizes(torch.bfloat16)[0] == 8192
    fake.memory = (-6 * 2**30 + 2 * 3 * 2 * 5000**2, 0)  # room for two of 5000^3 in 16 bits, 6 GiB are kept by torch
    assert machine._sizes(torch.bfloat16)[0] == 4096
    assert machine._sizes(torch.float32)[0] == 2048
    monkeypatch.setattr(timing, "_GPU_GEMM_SIZES", (64, 32))
    monkeypatch.setattr(timing, "_GPU_COPY_BYTES", 2**22)
    counted = {"product": 0, "copy": 0}
    multiply, copy = timing.Machine._multiply, timing.Machine._copy

    def counting_multiply(self: Any, size: int, dtype: torch.dtype) -> Any:
        call = multiply(self, size, dtype)

        def product() -> torch.Tensor:
            counted["product"] += 1
            fake.launch(1.0)
            out = call()
            assert out.unique().numel() > size  # not of equal numbers
            return out

        return product

    def counting_copy(self: Any) -> None:
        counted["copy"] += 1
        fake.launch(2.0)
        copy(self)

    monkeypatch.setattr(timing.Machine, "_multiply", counting_multiply)
    monkeypatch.setattr(timing.Machine, "_copy", counting_copy)
    machine.sample(torch.float32)
    assert counted == {"product": 10 + 3, "copy": 10}
    rates = machine.rates()["float32", torch.get_num_threads()]
    assert (rates.gemm, rates.size) == (pytest.approx(2 * 64**3 / 1e-3), 64)
    assert rates.copy == pytest.approx(2 * 2**22 / 2e-3)
    assert machine._source.unique().numel() == 256


def test_graphs_are_captured_after_a_warm_up_on_a_stream_of_their_own(fake: gpu_stand_in.FakeGpu) -> None:
    replay, kept = gpu_place.capture_graph(lambda: fake.asked.append("call") or "kept", gpu_stand_in.Stand())
    replay()
    assert kept == "kept"
    assert fake.asked == [
        *("wait_stream", "begin Stream", "call", "call", "end Stream", "wait_stream"),
        *("begin Graph", "call", "end Graph", "set_stream", "replay"),
    ]


def test_what_waits_for_the_device_is_not_captured(fake: gpu_stand_in.FakeGpu) -> None:
    def waiting() -> None:
        assert fake.sync_mode == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    assert "waits for the device" in str(gpu_place.no_capture_reason(waiting))
    assert fake.sync_mode == "default"
    assert gpu_place.no_capture_reason(lambda: None) is None
    with pytest.raises(RuntimeError, match="other"):
        gpu_place.no_capture_reason(lambda: (_ for _ in ()).throw(RuntimeError("other")))
    assert fake.sync_mode == "default"


def test_every_runner_has_a_graph_or_a_reason(fake: gpu_stand_in.FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in: times of graphs are those of one call, and peers that read lengths say why they have none."""
    calls = {"count": 0}

    def replayed(run: Callable[[], Any], place: Any) -> tuple[Callable[[], None], Any]:
        def replay() -> None:
            calls["count"] += 1

        return replay, run()

    interleaved = timing.interleaved

    def timed(runs: Any, *arguments: Any, **more: Any) -> dict[str, timing.Timing]:
        found = interleaved(runs, *arguments, **more)
        return {"graph": timing.Timing(3e-3, 2.7e-3, 3.6e-3, 5)} if "graph" in runs else found

    monkeypatch.setattr(timing, "interleaved", timed)

    def reason(run: Callable[[], Any]) -> str | None:
        before = len(read_lengths)
        run()
        return "waits for the device: lengths are read from it" if len(read_lengths) > before else None

    read_lengths: list[int] = []
    real = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda x: read_lengths.append(1) or real(x))
    monkeypatch.setattr(gpu_measure, "capture_graph", replayed)
    monkeypatch.setattr(gpu_measure, "no_capture_reason", reason)
    found: list[Record] = []
    chosen = replace(job("pma-tiny-bf16"), dtype="float32")
    assert gpu_measure.measure(chosen, ["triton"], gpu_stand_in.Stand(), found.append)
    assert calls["count"] > 0
    last = {(one["runner"], one["pass"]): one for one in found if one["median"] is not None}
    assert {one["peak"] for one in last.values()} == {2**30}
    assert len(last) < len([one for one in found if one["median"] is not None])  # eager times were written before
    for direction in run.PASSES:
        ours = last[OURS, direction]
        # A third of a replay, which is a call on each of three sets.
        assert (ours["graph_low"], ours["graph"], ours["graph_high"]) == pytest.approx((0.9e-3, 1e-3, 1.2e-3))
        assert last["padded SDPA", direction]["graph"] is not None


# ---------------------------------------------------------------- tables


def bench_record(runner: str, median: float | None, graph: float | None = None, **more: Any) -> Record:
    return {
        "kind": "bench", "step": "pma-104-bf16", "op": "pma_pooling", "law": "all 104", "rows": 2, "tokens": 208,
        "longest": 104, "sizes": "H4", "dtype": "bfloat16", "pass": "forward", "runner": runner,
        "backend": "triton" if runner == OURS else "torch", "median": median, "samples": 9, "spread": 0.1,
        "graph": graph, "graph_problem": None, "flops": 10**9, "bytes": 10**9, "wanted": 3.0, "peak": 2**20,
        "problem": None, "tiny": False, "device": "cuda", **more,
    }  # fmt: skip


def test_tables_hold_ours_against_the_fastest_right_peer() -> None:
    ceiling = {"kind": "ceiling", "step": "ceilings", "dtype": "bfloat16", "gemm": 1e14, "copy": 4e12, "size": 8192,
               "copied": 2**32, "gemm_spread": 0.01, "copy_spread": 0.02}  # fmt: skip
    found = [
        ceiling,
        bench_record(OURS, 9e-3),
        bench_record("slow", 5e-3, 4e-3),
        bench_record("fast", 2e-3, graph_problem="waits for the device"),
        bench_record("wrong", None, problem="wrong out: 99 of its budget, 10 allowed"),
        bench_record(OURS, 1e-3, 5e-4),  # takes the first one's place
    ]
    (line,) = gpu_tables.ratios(gpu_tables._latest(found[1:]), {"bfloat16": ceiling})
    assert line[4:] == (
        *("triton", "1 ms", "2 ms (fast)", "2.00x", "500 us", "4 ms (slow)", "8.00x", "50% copy", ">= 3x pass"),
    )
    text = gpu_tables.tables(found)
    assert "| bfloat16 | 100 TFLOP/s (8192^3) | 1% | 4000 GB/s (4 GiB) | 2% |" in text
    assert "- wrong: wrong out: 99 of its budget, 10 allowed (pma-104-bf16, forward)" in text
    assert "rehearsal" not in text
    assert text.count(f"| {OURS} (triton) |") == 1
    assert gpu_tables.tables([]) == ""


def test_records_that_make_no_sense_are_counted_and_the_others_told() -> None:
    right = [bench_record(OURS, 1e-3), bench_record("peer", 2e-3)]
    odd = [{**right[0], key: value} for key, value in (("median", "fast"), ("step", 7), ("rows", None), ("runner", []))]
    odd += [{"kind": "bench"}, {"kind": "check", "ok": False}, {"kind": "ceiling", "gemm": 0}, {"kind": "failed"}]
    text = gpu_tables.tables([*odd, {"kind": "parity", "anything": 1}, *right])
    assert "- 8 records that make no sense" in text
    assert "2 ms (peer) | 2.00x" in text
    assert "make no sense" not in gpu_tables.tables([{"kind": "parity"}, *right])
    assert "- 1 records that make no sense" in gpu_tables.tables(["nonsense"])  # type: ignore[list-item]


def test_checks_that_found_something_are_in_the_tables() -> None:
    one = {"kind": "check", "step": "large-batch.pma_pooling", "backend": "cuda", "what": "rows alone", "row": 7,
           "dtype": "float32", "problem": "out[7] is 1, wanted 2", "tiny": False, "device": "cuda"}  # fmt: skip
    text = gpu_tables.tables([{**one, "ok": False}, {**one, "ok": True}, {**one, "ok": None}])
    assert "| large-batch.pma_pooling | cuda | 3 | 1 | 1 | 1 |" in text
    assert "- large-batch.pma_pooling (cuda), rows alone, float32, row 7: out[7] is 1, wanted 2" in text


# ---------------------------------------------------------------- inputs


def test_large_tensors_are_drawn_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """And small ones as ever, bit by bit."""
    case = testing.Case("pma_pooling", "x", lengths=(5, 3), tail=1, strided=True)
    before = testing.make_inputs(case, torch.float32)
    monkeypatch.setattr(drawing, "MOST_DRAWN_ON_CPU", 400)
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(9, 4, 19, generator=generator, dtype=torch.float64)
    assert torch.equal(before["k"][:8], wanted[:8, :, 1:17].float())
    assert all(torch.equal(x[:8], before[name][:8]) for name, x in testing.make_inputs(case, torch.float32).items())
    monkeypatch.setattr(drawing.Numbers, "draws", lambda self: True)  # as a GPU does
    drawn, again, other = (testing.make_inputs(case, torch.float32, seed=seed) for seed in (0, 0, 1))
    assert drawn["k"].shape == before["k"].shape
    assert drawn["k"][8:].isnan().all()
    assert drawn["k"].requires_grad
    assert torch.equal(drawn["k"][:8], again["k"][:8])
    assert not torch.equal(drawn["k"][:8], before["k"][:8])
    assert not torch.equal(drawn["k"][:8], other["k"][:8])
    assert torch.equal(drawn["seeds"], testing.make_inputs(case, torch.float32, seed=0)["seeds"])
    folded = workloads.inputs("pma_folded", (400,), Sizes(2, 8, 2, width=16), torch.float32)
    assert abs(float(folded["x"].detach().std()) - 1) < 0.1
