"""Peers, timing and inputs of the GPU's bench, with a stand-in for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gpu_stand_in
import pytest
import torch
from gpu_stand_in import Record, rehearsal_job
from interformer_bench import checks, gpu_measure, gpu_place, run, timing, workloads
from interformer_bench.peers import OURS, Peer, on_gpu, registry
from interformer_bench.workloads import Sizes

from interformer_kernels import testing
from interformer_kernels.testing import draw as drawing


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> gpu_stand_in.FakeGpu:
    return gpu_stand_in.install(monkeypatch)


# ---------------------------------------------------------------- peers


@pytest.mark.parametrize("op", testing.OPS)
@pytest.mark.parametrize("lengths", [(5, 1, 0, 33), (7, 7, 7)], ids=["ragged", "full"])
def test_peers_that_know_the_lengths_are_right(op: str, lengths: tuple[int, ...]) -> None:
    sizes = {"personalized_ffn": Sizes(1, 12, width=7)}.get(op, Sizes(2, 8, 2, gated=op == "gated_cross_attention"))
    gpu_peers = registry.gpu_peers(op, lengths)
    assert (set(on_gpu.FULL) <= set(gpu_peers)) == (len(set(lengths)) == 1 and op in testing.OPS[:3])
    checker = checks.Checker(op, lengths, sizes, torch.float32)
    problems = {name: checker.check(name, peer).problem for name, peer in gpu_peers.items()}
    needs_a_gpu = {"varlen_attn", "varlen_attn, longest known", "SDPA cuDNN, full rows"}
    assert {name for name, problem in problems.items() if problem} == needs_a_gpu & set(gpu_peers)
    assert all("failed: " in str(problems[name]) for name in needs_a_gpu & set(gpu_peers))


def test_a_full_row_peer_takes_the_kernel_it_is_named_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels: list[str] = []

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        kernels.append(f"flash {torch._C._get_flash_sdp_enabled()}, cudnn {torch._C._get_cudnn_sdp_enabled()}")
        assert q.shape == k.shape == (2, 3, 4, 8)
        return v

    monkeypatch.setattr(on_gpu, "sdpa", sdpa)
    inputs = workloads.inputs("jagged_attention", (4, 4), Sizes(3, 8), torch.float32)
    for name in on_gpu.FULL:
        out = workloads.forward(registry.gpu_peers("jagged_attention", (4, 4))[name].run, inputs)
        assert torch.equal(out, inputs["v"])
    assert kernels == ["flash True, cudnn False", "flash False, cudnn True"]


@pytest.mark.parametrize("takes_scale", [True, False])
def test_varlen_attention_is_told_what_is_known(monkeypatch: pytest.MonkeyPatch, takes_scale: bool) -> None:
    from interformer_bench.peers import varlen
    from torch.nn.attention import varlen as torch_varlen

    received: list[Any] = []

    def newer(q: Any, k: Any, v: Any, a: Any, b: Any, most_q: int, most_k: int, *, scale: Any = None) -> torch.Tensor:
        received.append((most_q, most_k, scale, a.dtype))
        return torch.zeros_like(q)

    def older(q: Any, k: Any, v: Any, a: Any, b: Any, most_q: int, most_k: int) -> torch.Tensor:
        return newer(q, k, v, a, b, most_q, most_k)

    monkeypatch.setattr(torch_varlen, "varlen_attn", newer if takes_scale else older)
    varlen._takes_scale.cache_clear()
    q, offsets = torch.zeros(9, 2, 16), torch.tensor([0, 2, 9])
    scale = 0.25 if takes_scale else None
    varlen.attend_jagged(q, q, q, offsets, 0.25)
    varlen.attend_jagged(q, q, q, offsets, 0.25, longest=8)
    assert varlen.attend_dense(torch.zeros(2, 3, 2, 16), q, q, offsets, 0.25, longest=8).shape == (2, 3, 2, 16)
    assert received == [(most_q, most_k, scale, torch.int32) for most_q, most_k in ((7, 7), (8, 8), (3, 8))]
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
    """A launch takes no time, so the expected time of a peer must come from the device."""
    checker = checks.Checker("pma_pooling", (3, 4), Sizes(2, 8, 2), torch.float32)
    pma_pooling = workloads.ours("pma_pooling")

    def peer(**arguments: Any) -> torch.Tensor:
        fake.launch(7000.0)
        return pma_pooling(**arguments)

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
    replay, result = gpu_place.capture_graph(lambda: fake.requests.append("call") or "kept", gpu_stand_in.Stand())
    replay()
    assert result == "kept"
    assert fake.requests == [
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
    """On a stand-in: times of graphs are per call, and peers that read lengths have a reason instead."""
    calls = {"count": 0}

    def replayed(run: Callable[[], Any], place: Any) -> tuple[Callable[[], None], Any]:
        def replay() -> None:
            calls["count"] += 1

        return replay, run()

    interleaved = timing.interleaved

    def timed(runs: Any, *arguments: Any, **options: Any) -> dict[str, timing.Timing]:
        records = interleaved(runs, *arguments, **options)
        return {"graph": timing.Timing(3e-3, 2.7e-3, 3.6e-3, 5)} if "graph" in runs else records

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
    records: list[Record] = []
    chosen = replace(rehearsal_job("pma-tiny-bf16"), dtype="float32")
    assert gpu_measure.measure(chosen, ["triton"], gpu_stand_in.Stand(), records.append)
    assert calls["count"] > 0
    last = {(record["runner"], record["pass"]): record for record in records if record["median"] is not None}
    assert {record["peak"] for record in last.values()} == {2**30}
    assert len(last) < len(
        [record for record in records if record["median"] is not None]
    )  # eager times were written before
    for direction in run.PASSES:
        ours = last[OURS, direction]
        # A third of a replay, which is a call on each of three sets.
        assert (ours["graph_low"], ours["graph"], ours["graph_high"]) == pytest.approx((0.9e-3, 1e-3, 1.2e-3))
        assert last["padded SDPA", direction]["graph"] is not None


# ---------------------------------------------------------------- inputs


def test_large_tensors_are_drawn_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors keep their bits."""
    case = testing.Case("pma_pooling", "x", lengths=(5, 3), tail=1, strided=True)
    before = testing.make_inputs(case, torch.float32)
    monkeypatch.setattr(drawing, "MOST_DRAWN_ON_CPU", 400)
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(9, 4, 19, generator=generator, dtype=torch.float64)
    assert torch.equal(before["k"][:8], expected[:8, :, 1:17].float())
    assert all(torch.equal(x[:8], before[name][:8]) for name, x in testing.make_inputs(case, torch.float32).items())
    monkeypatch.setattr(drawing.Numbers, "draws", lambda self: True)  # as a GPU does
    drawn, repeated, of_other_seed = (testing.make_inputs(case, torch.float32, seed=seed) for seed in (0, 0, 1))
    assert drawn["k"].shape == before["k"].shape
    assert drawn["k"][8:].isnan().all()
    assert drawn["k"].requires_grad
    assert torch.equal(drawn["k"][:8], repeated["k"][:8])
    assert not torch.equal(drawn["k"][:8], before["k"][:8])
    assert not torch.equal(drawn["k"][:8], of_other_seed["k"][:8])
    assert torch.equal(drawn["seeds"], testing.make_inputs(case, torch.float32, seed=0)["seeds"])
    folded = workloads.inputs("pma_folded", (400,), Sizes(2, 8, 2, width=16), torch.float32)
    assert abs(float(folded["x"].detach().std()) - 1) < 0.1
