"""The Triton kernels as part of the package: registration, compilation, export, offsets of any content, huge grids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from gpu_tools import inside
from guards import guarded, guarded_inputs
from recorded import all_ops_at_once, recorded_calls
from triton_calls import results

import interformer_kernels as ik
from interformer_kernels import _backend, testing
from interformer_kernels.testing import Case, offsets_of

# ---------------------------------------------------------------- the choice of backends


def test_the_interpreter_serves_only_where_it_is_named() -> None:
    for op in testing.OPS:
        assert _backend.unsupported_reason(op, "triton", "cpu", torch.float32) is None
        for device in ("cpu", "cuda"):
            assert _backend.choose(op, device, torch.float32) != "triton"
    x = torch.randn(3, 1, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot serve: .*found torch.float64"):
        ik.jagged_attention(x, x, x, offsets_of((3,)), backend="triton")


def test_offsets_are_checked() -> None:
    k, bad = torch.randn(4, 1, 4), torch.tensor([0, 9])
    with pytest.raises(ValueError, match=r"pma_pooling: offsets\[1\] must be at most 4"):
        ik.pma_pooling(k[:1], k, None, bad, backend="triton")
    ik.set_validation("off")
    clamped = ik.pma_pooling(k[:1], k, None, bad, backend="triton")
    assert isinstance(clamped, torch.Tensor)
    assert torch.equal(clamped, ik.pma_pooling(k[:1], k, None, torch.tensor([0, 4]), backend="triton"))


@pytest.mark.parametrize("op", testing.OPS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_of_any_content(op: str, dtype: torch.dtype) -> None:
    """Entries beyond the tokens are cut; a disorder reads nothing outside the tensors, and leaves nothing unwritten.

    NaN stands around the tensors, and in memory that is not written yet.
    """
    ik.set_validation("off")
    extra: dict[str, Any] = {"rope": 6} if op == "apply_rotary" else {"residual": True}
    inputs = guarded_inputs(Case(op, "", lengths=(5, 3, 4), tail=0, heads=2, kv_heads=2, **extra), torch.float32)
    name = "kv_offsets" if op == "gated_cross_attention" else "offsets"
    limits = torch.iinfo(dtype)
    beyond = guarded(torch.tensor([limits.min, 5, 40, limits.max], dtype=dtype))
    cut = results(op, {**inputs, name: torch.tensor([0, 5, 12, 12], dtype=dtype)})
    for quantity, x in results(op, {**inputs, name: beyond}).items():
        assert torch.equal(x, cut[quantity]), quantity
    disorders = [7, 2, limits.max, limits.min], [limits.max, 9, 0, 11], [0, limits.min, 12, 3]
    for disordered in disorders:
        for quantity, x in results(op, {**inputs, name: guarded(torch.tensor(disordered, dtype=dtype))}).items():
            assert not x.isnan().any(), (quantity, disordered)


@pytest.mark.parametrize("op", ["pma_pooling", "gated_cross_attention"])
def test_disordered_offsets_of_split_rows(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where long rows are split: partials are written before they are combined."""
    from interformer_kernels._launch import splits

    ik.set_validation("off")
    monkeypatch.setattr(splits, "SPLIT_KV", 32)
    inputs = guarded_inputs(Case(op, "", lengths=(90, 3, 40), tail=0, heads=2, kv_heads=2), torch.float32)
    name = "kv_offsets" if op == "gated_cross_attention" else "offsets"
    for disordered in ([70, 2, 1000, -5], [0, 100, 5, 120], [3, 130, 90, 133]):
        for quantity, x in results(op, {**inputs, name: guarded(torch.tensor(disordered))}).items():
            assert not x.isnan().any(), (quantity, disordered)


def test_every_token_has_a_row_whatever_the_offsets() -> None:
    """The rows that a kernel finds are a partition of all tokens."""
    ik.set_validation("off")
    x, rope = torch.randn(40, 1, 4), testing.rotary_tables(40, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        offsets = torch.randint(-10, 50, (9,), generator=generator)
        assert not ik.apply_rotary(x, offsets, rope, backend="triton").isnan().any(), offsets


# ---------------------------------------------------------------- the compiler


@pytest.mark.parametrize(
    "case",
    [Case("jagged_attention", "gated", lengths=(3, 0, 9), gate="head", residual=True, rope=6), Case("pma_pooling", "",
     lengths=(3, 9), gate="channel"), Case("personalized_ffn", "", lengths=(3, 9), residual=True)],
    ids=str,
)  # fmt: skip
def test_opcheck(case: Case) -> None:
    for func, args in recorded_calls(case, "triton"):
        clean = tuple(x.nan_to_num(0.5) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)
        torch.library.opcheck(func, clean)


def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """`backend=None` takes Triton, on the CPU too."""
    monkeypatch.setattr(_backend, "choose", lambda *_: "triton")
    _backend.kernels.cache_clear()


def test_compile_without_a_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ops in one graph, which gives what the eager call gives; other numbers of tokens and rows need no other."""
    _on_triton(monkeypatch)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(all_ops_at_once, fullgraph=True, dynamic=True, backend=counter)
    # The first sizes differ from all others in sight: the compiler takes equal sizes for one symbol.
    frames = []
    for lengths in ((5, 6), (7, 2, 9)):
        x = torch.randn(sum(lengths), 8, requires_grad=True)
        arguments = torch.randn(8, 8), offsets_of(lengths), testing.rotary_tables(64, 4)
        values = [run(x, *arguments) for run in (all_ops_at_once, compiled)]
        grads = [torch.autograd.grad(value, x)[0] for value in values]
        torch.testing.assert_close(values[1], values[0])
        torch.testing.assert_close(grads[1], grads[0])
        frames.append(counter.frame_count)
    assert frames == frames[:1] * len(frames)
    _backend.kernels.cache_clear()


class _Model(torch.nn.Module):
    """A query that pools the rows of a batch, for export."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = torch.nn.Parameter(torch.randn(2, 2, 4))

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(1, (2, 4))
        y = ik.jagged_attention(heads, heads, heads, offsets, causal=True, backend="triton")
        out = ik.pma_pooling(self.seeds, y, None, offsets, backend="triton")
        assert isinstance(out, torch.Tensor)
        return out


def test_export_round_trip(tmp_path: Any) -> None:
    """Saved, loaded, and called with other sizes."""
    model = _Model().eval()
    tokens, ends = torch.export.Dim("tokens", min=2), torch.export.Dim("ends", min=3)
    with torch.no_grad():
        program = torch.export.export(
            model, (torch.randn(9, 8), offsets_of((4, 5))), dynamic_shapes=({0: tokens}, {0: ends})
        )
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        x, offsets = torch.randn(13, 8), offsets_of((6, 0, 7))
        torch.testing.assert_close(loaded(x, offsets), model(x, offsets))


# ---------------------------------------------------------------- sizes past the limits of grids and of 32 bits


def _last_programs(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Run only the last `count` programs of larger grids; returns the list of grid sizes, filled by later calls."""
    from triton.runtime.interpreter import interpreter_builder

    from interformer_kernels._triton import _run

    sizes: list[int] = []
    start = _run.start

    def in_part(kernel: Any, grid: int, *arguments: Any, **named: Any) -> None:
        sizes.append(grid)
        skipped = max(0, grid - count)
        with monkeypatch.context() as patch:
            indices, dim = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim
            patch.setattr(interpreter_builder, "set_grid_dim", lambda x, y, z: dim(grid, y, z))
            patch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: indices(x + skipped, y, z))
            start(kernel, min(grid, count), *arguments, **named)

    monkeypatch.setattr(_run, "start", in_part)
    return sizes


@pytest.mark.parametrize("op", testing.OPS)
def test_more_than_65535_rows(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 65540 rows, which the last programs of a grid of one axis compute, is what it is alone."""
    from interformer_kernels._triton._rows import marks

    rows = 65540
    case = Case(op, "", lengths=(2,) * rows, tail=0, heads=1, kv_heads=1, head_size=4, value_size=4, queries=1, rope=4)
    inputs = testing.make_inputs(case, torch.float32)
    alone = {name: offsets_of((2,)) if name in ("offsets", "kv_offsets") else x for name, x in inputs.items()}
    for name in ("q", "k", "v", "x", "weight", "bias", "scores", "weights"):
        if name in inputs:
            alone[name] = inputs[name][-(len(inputs[name]) // rows) :]
    with torch.no_grad():
        single = testing.call(op, alone, "triton")[0]
        # Behind the programs of rows of few queries are those of later splits, which these rows do not have.
        behind = marks(2 * rows, 128) if op in ("pma_pooling", "gated_cross_attention") else 0
        sizes = _last_programs(monkeypatch, 4 + behind)
        found = testing.call(op, inputs, "triton")[0]
    assert max(sizes) > 65535
    assert torch.equal(found[-len(single) :], single)


@pytest.mark.parametrize(
    ("op", "far"), [("jagged_attention", "k"), ("gated_cross_attention", "q"), ("personalized_ffn", "weight"),
                    ("apply_rotary", "x"), ("jagged_softmax", "scores"), ("jagged_weighted_sum", "v")],
)  # fmt: skip
def test_beyond_two_to_the_31(op: str, far: str) -> None:
    """Element offsets need 64 bits; only a few pages of the memory are touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    step = 2**31 + 100
    lengths = (1, 1) if far in ("weight", "q") else (2,)
    case = Case(op, "", lengths=lengths, heads=1, kv_heads=1, head_size=4, value_size=4, tail=0, queries=2, rope=4)
    inputs = testing.make_inputs(case, torch.bfloat16)
    x = inputs[far].detach()
    wide = torch.empty(step + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (step, *x.stride()[1:]))
    with torch.no_grad():
        near = testing.call(op, inputs, "triton")[0]
        assert torch.equal(testing.call(op, {**inputs, far: wide.copy_(x)}, "triton")[0], near)


def test_heads_far_apart() -> None:
    """The same for what lies between heads: head times stride is beyond 32 bits, though no stride is."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    case = Case("pma_pooling", "", lengths=(2,), heads=4, kv_heads=4, head_size=4, tail=0, queries=2, shared_value=True)
    inputs = testing.make_inputs(case, torch.bfloat16)
    k = inputs["k"].detach()
    step = 2**30
    wide = torch.empty(3 * step + 8, dtype=k.dtype).as_strided(k.shape, (4, step, 1))
    near = testing.call(case.op, inputs, "triton")[0]
    with torch.no_grad():
        assert torch.equal(testing.call(case.op, {**inputs, "k": wide.copy_(k)}, "triton")[0], near)


def test_the_stages_of_the_gpu_report_run_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that they do but for the device; and two runs that differ are seen."""
    place = inside.Place("cpu", "triton")
    monkeypatch.setattr(testing, "OPS", ("pma_pooling", "apply_rotary"))
    monkeypatch.setattr(inside, "DTYPES", ("float32",))
    assert place.serving("apply_rotary") == "triton"
    assert inside.small(place) == 0
    assert "'ops': ['pma_pooling', 'apply_rotary']" in capsys.readouterr().out
    monkeypatch.setattr(testing, "OPS", ("apply_rotary",))
    assert inside.smoke(place) == inside.determinism(place) == 0
    assert [line.count("'ok': True") for line in capsys.readouterr().out.splitlines()] == [1, 1]
    monkeypatch.setattr(testing, "evaluate", lambda run, op, inputs: {"out": torch.rand(3)})
    assert inside.determinism(place) == 1


def test_lazily_negated_views_are_read_as_they_are() -> None:
    """Views that PyTorch negates only when they are read; raw memory holds the other sign."""
    x = torch.randn(7, 2, 4, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    offsets = offsets_of((3, 4))
    found, wanted = (
        ik.jagged_attention(y, y, y, offsets, gate=y, residual=y, backend="triton") for y in (x, x.clone())
    )
    assert torch.equal(found, wanted)
    weight = torch.randn(2, 8, 8, dtype=torch.complex64).conj().imag
    flat = x.clone().flatten(1)
    found = ik.personalized_ffn(flat, weight, offsets, backend="triton")
    assert torch.equal(found, ik.personalized_ffn(flat, weight.clone(), offsets, backend="triton"))
