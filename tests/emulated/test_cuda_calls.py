"""The CUDA kernels as part of the package: offsets of any content, memory of any layout, huge sizes, registration."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import index_views
import pytest
import torch
from cpu_calls import MEMORY_LAYOUTS, relaid_inputs
from cuda_calls import SERVED, results
from gpu_tools import inside
from grid import case_ids
from guards import guarded, guarded_inputs
from recorded import recorded_calls

import interformer_kernels as ik
from interformer_kernels import _C, _backend, testing
from interformer_kernels._calls import RotaryCall, RotaryOutputs
from interformer_kernels._launch import splits
from interformer_kernels.testing import Case, offsets_of


def small(op: str, **sizes: Any) -> Case:
    """A call with a residual, where its op takes one."""
    extra: dict[str, Any] = {"rope": 4} if op == "apply_rotary" else {"residual": True}
    return Case(op, "", **{"lengths": (5, 3, 4), "heads": 2, "kv_heads": 2, **extra, **sizes})


def test_a_dtype_that_is_not_served() -> None:
    x = torch.randn(3, 1, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot serve: it serves .*found torch.float64"):
        ik.apply_rotary(x, offsets_of((3,)), testing.rotary_tables(3, 4), backend="cuda")


@pytest.mark.parametrize("case", index_views.CASES, ids=case_ids(index_views.CASES))
def test_strides_of_index_tensors(case: Case) -> None:
    for view, plain in index_views.pairs(testing.make_inputs(case, torch.float32)):
        actual = results(case.op, view)
        for quantity, x in results(case.op, plain).items():
            assert torch.equal(actual[quantity], x), quantity


@pytest.mark.parametrize("op", SERVED)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_offsets_of_any_content(op: str, dtype: torch.dtype) -> None:
    """Entries beyond the tokens are clamped; reading beside a tensor would show anywhere in the results."""
    ik.set_validation("off")
    inputs = guarded_inputs(small(op, tail=0), torch.float32)
    name = "kv_offsets" if op == "gated_cross_attention" else "offsets"
    limits = torch.iinfo(dtype)
    beyond = guarded(torch.tensor([limits.min, 5, 40, limits.max], dtype=dtype))
    clamped = results(op, {**inputs, name: torch.tensor([0, 5, 12, 12], dtype=dtype)})
    for quantity, x in results(op, {**inputs, name: beyond}).items():
        assert torch.equal(x, clamped[quantity]), quantity


def disordered(rows: int, tokens: int, draw: int) -> torch.Tensor:
    """Offsets of so many rows that break their contract, in another way at every draw."""
    generator = torch.Generator().manual_seed(draw)
    entries = torch.randint(-tokens // 4, tokens + tokens // 4, (rows + 1,), generator=generator)
    if draw % 3 == 1:  # sorted, but two entries are swapped, and the first and last are not 0 and the number of tokens
        entries = entries.sort().values
        entries[[1, rows - 1]] = entries[[rows - 1, 1]]
    if draw % 3 == 2:
        entries[draw % rows] = torch.iinfo(torch.int64).min if draw % 2 else torch.iinfo(torch.int64).max
    return guarded(entries)


BROKEN = {"lengths": (60, 3, 0, 40, 1, 30), "tail": 0}
# Where queries and keys have different offsets, the backward of keys may pair a key with queries whose statistics leave
# it out; then softmax probabilities may be infinite. Other scores are finite everywhere.
POINTWISE = {"options": {"score": "silu"}}
OWN_QUERIES = {"query_lengths": (2, 30, 9, 0, 50, 1)}
BROKEN_CASES = [
    small("apply_rotary", **BROKEN),
    small("personalized_ffn", **BROKEN),
    small("jagged_softmax", **BROKEN),
    small("jagged_weighted_sum", **BROKEN),
    small("jagged_attention", **BROKEN, gate="full", options={"causal": True, "num_prefix": 2}),
    small("jagged_attention", **BROKEN, **OWN_QUERIES, **POINTWISE),
    small("gated_cross_attention", **BROKEN, **OWN_QUERIES, **POINTWISE, gate="channel"),
    small("gated_cross_attention", **BROKEN, queries=40, **POINTWISE),
    small("gated_cross_attention", **BROKEN, **POINTWISE, gate="full"),
    small("pma_pooling", **BROKEN, shared_value=True, gate="full", options={"score": "gelu", "skip_prefix": 2}),
]
BROKEN_CASES = [case for case in BROKEN_CASES if case.op in SERVED]


@pytest.mark.parametrize("case", BROKEN_CASES, ids=lambda case: f"{case.op}-{case.gate or case.queries}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("split", [1024, 64], ids=["whole", "split"])
def test_disordered_offsets_leave_nothing_unwritten(
    case: Case, dtype: torch.dtype, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are a partition of the tokens for any offsets. Unwritten memory and memory beside tensors are NaN."""
    monkeypatch.setattr(splits, "SPLIT_KV", split)
    monkeypatch.setattr(splits, "SPLIT_TOKENS", split)
    ik.set_validation("off")
    inputs = guarded_inputs(case, dtype)
    lead = next(name for name in ("x", "k", "v", "scores") if name in inputs)
    tokens = {"offsets": lead, "kv_offsets": "k", "q_offsets": "q"}
    if case.op == "jagged_attention":
        tokens["offsets"] = "q"
    names = [name for name in tokens if inputs.get(name) is not None]
    for draw in range(6):
        broken = {name: disordered(len(case.lengths), len(inputs[tokens[name]]), draw) for name in names}
        if draw > 3:
            del broken[names[-1]]  # where there are two, one of them is right
        given = {**inputs, **broken}
        for quantity, x in results(case.op, given).items():
            assert not x.isnan().any(), (quantity, draw, broken)
        if given.pop("score", "softmax") != "softmax":
            assert not testing.call(case.op, given, "cuda")[0].isnan().any(), (draw, broken)


def test_rows_that_fit_a_split_keep_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients of unsplit rows keep their bits beside a row that is split; the split row's are close."""
    inputs = guarded_inputs(small("personalized_ffn", lengths=(64, 200, 0, 65, 9)), torch.float32)
    whole = results("personalized_ffn", inputs)
    monkeypatch.setattr(splits, "SPLIT_TOKENS", 64)
    split = results("personalized_ffn", inputs)
    for name in ("dweight", "dbias"):
        assert torch.equal(split[name][[0, 2, 4]], whole[name][[0, 2, 4]]), name
        assert not torch.equal(split[name][1], whole[name][1]), name
        torch.testing.assert_close(split[name], whole[name])


@pytest.mark.parametrize("op", SERVED)
@pytest.mark.parametrize("how", MEMORY_LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_any_layout(op: str, how: str, dtype: torch.dtype) -> None:
    """Bits depend neither on strides nor on the width of copies that the alignment allows."""
    inputs = testing.make_inputs(small(op, head_size=8, value_size=8), dtype)
    actual = results(op, relaid_inputs(inputs, how))
    for name, x in results(op, inputs).items():
        assert torch.equal(actual[name], x), name


@pytest.mark.parametrize("op", SERVED)
def test_positions_and_offsets_that_are_not_contiguous(op: str) -> None:
    inputs = testing.make_inputs(small(op, positions=op == "apply_rotary"), torch.float32)
    names = [name for name in ("offsets", "kv_offsets", "positions") if name in inputs]
    spread = {name: torch.stack((inputs[name], inputs[name] * 0 + 77), 1)[:, 0] for name in names}
    actual = results(op, {**inputs, **spread})
    for name, x in results(op, inputs).items():
        assert torch.equal(actual[name], x), name


@pytest.mark.parametrize("op", SERVED)
def test_more_than_65535_rows(op: str, emulated: ModuleType) -> None:
    """The last of 65540 rows, which the last blocks of a grid compute, has the bits that it has alone."""
    sizes = {"heads": 1, "kv_heads": 1, "head_size": 4, "value_size": 4, "queries": 1, "tail": 0}
    inputs = testing.make_inputs(small(op, lengths=(2,) * 65540, **sizes), torch.float32)
    of_rows = ("q", "k", "v", "x", "weight", "bias", "scores", "weights", "residual")
    alone = {name: inputs[name][-(len(inputs[name]) // 65540) :] for name in of_rows if name in inputs}
    alone |= {name: offsets_of((2,)) for name in ("offsets", "kv_offsets") if name in inputs}
    with torch.no_grad():
        single = testing.call(op, {**inputs, **alone}, "cuda")[0]
        emulated.configure(0, True, last_blocks=4)
        out = testing.call(op, inputs, "cuda")[0]
    assert torch.equal(out[-len(single) :], single)


@pytest.mark.parametrize(("op", "far"), [(op, far) for op, far in (
    ("jagged_attention", "k"), ("gated_cross_attention", "q"), ("personalized_ffn", "weight"), ("apply_rotary", "x"),
    ("jagged_softmax", "scores"), ("jagged_weighted_sum", "v"),
) if op in SERVED])  # fmt: skip
def test_beyond_two_to_the_31(op: str, far: str) -> None:
    """Element offsets need 64 bits; of the memory only a few pages are ever touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    step = 2**31 + 104  # of whole vectors of 16 bytes, whose copies compute shorter distances in 32 bits
    lengths = (1, 1) if far in ("weight", "q") else (2,)
    sizes = {"heads": 1, "kv_heads": 1, "head_size": 8, "value_size": 8, "queries": 2, "tail": 0}
    inputs = testing.make_inputs(small(op, lengths=lengths, **sizes), torch.bfloat16)
    x = inputs[far].detach()
    wide = torch.empty(step + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (step, *x.stride()[1:]))
    with torch.no_grad():
        near = testing.call(op, inputs, "cuda")[0]
        assert torch.equal(testing.call(op, {**inputs, far: wide.copy_(x)}, "cuda")[0], near)


def test_lazily_negated_views_are_read_as_they_are() -> None:
    """PyTorch negates such a view only when it is read: its memory holds the numbers without their sign."""
    weight = torch.randn(2, 8, 8, dtype=torch.complex64).conj().imag
    assert weight.is_neg()
    x, offsets = torch.randn(7, 8), offsets_of((3, 4))
    lazy, negated = (ik.personalized_ffn(x, w, offsets, backend="cuda") for w in (weight, weight.clone()))
    assert torch.equal(lazy, negated)


@pytest.mark.parametrize("op", SERVED)
def test_opcheck(op: str) -> None:
    for func, args in recorded_calls(small(op), "cuda"):
        clean = tuple(x.nan_to_num(0.5) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args)
        torch.library.opcheck(func, clean)


# ---------------------------------------------------------------- the functions behind


def rotated(**changed: Any) -> torch.Tensor:
    """A call of the native function, with arguments changed."""
    cos, sin = testing.rotary_tables(5, 4)
    x = torch.randn(5, 2, 8)
    out = changed.pop("out", torch.empty_like(x))
    call = RotaryCall(x, offsets_of((2, 3)), cos, sin, None, interleaved=False)
    _C.cuda_apply_rotary(call._replace(**changed), RotaryOutputs(out, backwards=False))
    return out


INTEGERS = torch.zeros(5, 2, 8, dtype=torch.int32)
TRANSPOSED = torch.zeros(5, 8, 2).transpose(1, 2)
NO_OFFSETS = torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"x": None}, TypeError, "apply_rotary: x must be a torch.Tensor, found NoneType"),
        ({"x": INTEGERS}, TypeError, "x must be float32, float64, bfloat16 or float16, found int32"),
        ({"x": TRANSPOSED}, ValueError, "x must be contiguous along its last axis, found a stride of 2"),
        ({"out": torch.zeros(5, 2, 4)}, ValueError, r"out must be of the shape of x, \[5, 2, 8\], found float32"),
        ({"offsets": NO_OFFSETS}, ValueError, r"offsets must be \[B\+1\] with at least one entry"),
        ({"cos": torch.zeros(5, 5)}, ValueError, r"sin must be float32 \[P = 5, R/2 = 5\]"),
    ],
)
def test_arguments_are_checked(changed: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        rotated(**changed)


def test_float64_is_refused_by_the_function_itself() -> None:
    x = torch.zeros(5, 2, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match="CUDA kernels serve float32, bfloat16 and float16, found float64"):
        rotated(x=x, out=torch.empty_like(x))


# ---------------------------------------------------------------- the commands


def test_the_stages_of_the_gpu_report_run_here(
    emulated: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that they do for this backend, except on a device."""
    place = inside.Place("cpu", "cuda")
    assert [op for op in place.served() if place.serving(op) == "cuda"] == SERVED
    assert inside.small(place) == 0
    assert f"'ops': {SERVED}" in capsys.readouterr().out
    monkeypatch.setattr(inside, "DTYPES", ("float32",))
    monkeypatch.setattr(testing, "OPS", ("apply_rotary",))
    assert inside.smoke(place) == inside.determinism(place) == 0
    assert [line.count("'ok': True") for line in capsys.readouterr().out.splitlines()] == [1, 1]


@pytest.mark.parametrize("op", testing.OPS)
def test_what_is_not_there_is_refused(op: str) -> None:
    """A named backend never falls back."""
    if op not in SERVED:
        with pytest.raises(RuntimeError, match=f"{op}: backend 'cuda' cannot serve: there is no cuda kernel for {op}"):
            testing.call(op, testing.make_inputs(small(op), torch.float32), "cuda")
    assert _backend.choose(op, "cpu", torch.float32) != "cuda"
