"""The CPU kernel of pma_pooling: right for every option, the same bits always, safe whatever it is handed.

Its error against the budget is in test_parity.py; here it is held against a formula that is written row by row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from interformer_kernels import reference
from interformer_kernels.testing import offsets_of

pytest.importorskip("interformer_kernels._C", exc_type=ImportError)
from interformer_kernels._native import pma_pooling as native

SCORES = ("softmax", "identity", "relu", "silu", "gelu")
GATES = ("none", "full", "head", "channel", "scalar")
PLAIN: dict[str, Any] = {
    "gate": None,
    "residual": None,
    "scale": 0.3,
    "skip_prefix": 0,
    "score": "softmax",
    "post_scale": 1.0,
    "gate_form": "multiply",
    "gate_activation": "sigmoid",
}


class Call:
    """The arguments of one call, and what the kernel makes of them."""

    def __init__(self, seeds: Tensor, k: Tensor, v: Tensor | None, offsets: Tensor, **options: Any) -> None:
        self.tensors = seeds, k, v, offsets
        options = {**PLAIN, **options}
        self.gate, self.residual = options.pop("gate"), options.pop("residual")
        self.options = tuple(options.values())

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return native.forward(*self.tensors, self.gate, self.residual, *self.options, True)

    def backward(self, grad_out: Tensor) -> list[Tensor]:
        """Gradients of the inputs that are there."""
        out, lse, attended = self.forward()
        attended = attended if attended.numel() else out
        grads = native.backward(grad_out, attended, lse, *self.tensors, self.gate, *self.options)
        return [g for g, x in zip(grads, (*self.tensors[:3], self.gate), strict=True) if x is not None]

    def results(self) -> list[Tensor]:
        """Everything that both directions give."""
        outputs = self.forward()
        return [*outputs, *self.backward(torch.linspace(-1, 1, outputs[0].numel()).to(outputs[0]).view_as(outputs[0]))]


def make(
    lengths: tuple[int, ...], *, m: int = 3, h: int = 4, hk: int = 2, d: int = 8, dv: int | None = None, tail: int = 2,
    dtype: torch.dtype = torch.float64, **options: Any,
) -> Call:  # fmt: skip
    """A random call; the tail holds NaN. `dv=None`: v is k."""
    total = sum(lengths)
    k, v = (None if n is None else torch.randn(total + tail, hk, n, dtype=dtype) for n in (d, dv))
    for x in (k, v):
        if x is not None:
            x[total:] = torch.nan
    return Call(torch.randn(m, h, d, dtype=dtype), k, v, offsets_of(lengths), **options)


def per_row(call: Call) -> Tensor:
    """OPS's formula, one row, seed and head at a time."""
    seeds, k, v, offsets = call.tensors
    scale, skip, score, post_scale, form, activation = call.options
    v = k if v is None else v
    shape = (offsets.shape[0] - 1, *seeds.shape[:2], v.shape[2])
    act = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu, "identity": lambda x: x}[activation]
    rows = []
    for b, m, h in itertools.product(*map(range, shape[:3])):
        tokens, head = slice(int(offsets[b]) + skip, int(offsets[b + 1])), h // (seeds.shape[1] // k.shape[1])
        s = scale * k[tokens, head] @ seeds[m, h]
        if score == "softmax":
            a = torch.softmax(s, 0) @ v[tokens, head]
        else:
            a = post_scale * (s if score == "identity" else getattr(F, score)(s)) @ v[tokens, head]
        rows.append(a)
    out = torch.stack(rows).view(shape)
    if call.gate is not None:
        out = out * act(call.gate) if form == "multiply" else act(out * call.gate)
    return out if call.residual is None else call.residual + out


def check_against_rows(call: Call) -> None:
    leaves = [x.requires_grad_() for x in (*call.tensors[:3], call.gate) if x is not None]
    truth = per_row(call)
    grad_out = torch.randn_like(truth)
    grads = torch.autograd.grad(truth, leaves, grad_out)
    with torch.no_grad():
        torch.testing.assert_close([call.forward()[0], *call.backward(grad_out)], [truth, *grads])


# ---------------------------------------------------------------- right


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "silu", "identity"])
@pytest.mark.parametrize("form", ["multiply", "self"])
@pytest.mark.parametrize("score", SCORES)
def test_every_score_and_gate(score: str, form: str, activation: str) -> None:
    shapes = {"full": (3, 3, 4, 6), "head": (3, 3, 4, 1), "channel": (4, 6), "scalar": ()}
    for gate in GATES:
        options = {
            "gate": None if gate == "none" else torch.randn(shapes[gate], dtype=torch.float64),
            "residual": torch.randn(3, 3, 4, 6, dtype=torch.float64),
            "post_scale": 1.0 if score == "softmax" else 0.5,
        }
        form_options = {"score": score, "gate_form": form, "gate_activation": activation}
        check_against_rows(make((3, 0, 70), dv=6, **options, **form_options))


@pytest.mark.parametrize("skip", [0, 2, 1000])
@pytest.mark.parametrize("dv", [None, 6])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1)], ids=str)
def test_heads_prefix_and_shared_values(heads: tuple[int, int], dv: int | None, skip: int) -> None:
    check_against_rows(make((3, 0, 2, 65), h=heads[0], hk=heads[1], dv=dv, skip_prefix=skip))


@pytest.mark.parametrize("d", [1, 7, 16, 33])
def test_every_length(d: int) -> None:
    """Each length from 0 to past two tiles: remainders of tiles and of vectors."""
    check_against_rows(make(tuple(range(140)), m=1, h=1, hk=1, d=d, dv=d + 1))


def test_no_rows_and_no_tokens() -> None:
    for lengths, tail in (((), 0), ((), 3), ((0, 0), 0), ((0, 0), 3)):
        for x in make(lengths, tail=tail, gate=torch.ones(1, dtype=torch.float64)).results():
            assert (x == -torch.inf).all() or not x.any()


def test_strided_inputs_are_read_in_place() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        call = make((5, 0, 70), dv=6, dtype=dtype, gate=torch.randn(3, 3, 4, 6, dtype=dtype))
        seeds, k, v, offsets = call.tensors
        packed = torch.cat((k, v), -1)
        wide = torch.stack((offsets, offsets.flip(0)), 1)[:, 0].int()
        gate = torch.empty(4, 6, 3, 3, dtype=dtype).permute(2, 3, 0, 1).copy_(call.gate)
        strided = Call(
            seeds.transpose(1, 2).contiguous().transpose(1, 2), packed[..., :8], packed[..., 8:], wide, gate=gate
        )
        turned = Call(seeds, k.transpose(1, 2).contiguous().transpose(1, 2), v.clone(), offsets, gate=call.gate)
        for other in (strided, turned):
            for a, b in zip(call.results(), other.results(), strict=True):
                assert torch.equal(a, b)


def test_lazily_negated_views() -> None:
    pairs = torch.randn(9, 2, 8, dtype=torch.complex128)
    k = pairs.conj().imag
    assert k.is_neg()
    seeds = torch.randn(3, 4, 8, dtype=torch.float64)
    plain, negated = Call(seeds, k.clone(), None, offsets_of((4, 5))), Call(seeds, k, None, offsets_of((4, 5)))
    for a, b in zip(plain.results(), negated.results(), strict=True):
        assert torch.equal(a, b)


def test_beyond_two_to_the_31() -> None:
    """Element offsets need 64 bits; of the memory only a few pages are ever touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = 2**31 + 100
    k = torch.empty(far + 8, dtype=torch.bfloat16).as_strided((2, 1, 4), (far, 4, 1))
    k.copy_(torch.randn(2, 1, 4))
    seeds = torch.randn(1, 1, 4).bfloat16()
    for a, b in zip(
        Call(seeds, k, None, offsets_of((2,))).results(),
        Call(seeds, k.clone(), None, offsets_of((2,))).results(),
        strict=True,
    ):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- element types


def converted(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` through the kernel: each is the one token of a row, so that A is v itself, rounded to `dtype`."""
    n = values.numel()
    v = values.view(n, 1, 1)
    zeros = torch.zeros(n, 1, 1, dtype=values.dtype)
    out, _, _ = Call(zeros[:1], zeros, v, torch.arange(n + 1)).forward()
    assert out.dtype == dtype
    return out.view(n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_bit_pattern_comes_through(dtype: torch.dtype) -> None:
    # All but -0, which the sum that starts at 0 turns into 0, as a matrix product does.
    every = torch.arange(1 - 2**15, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    found = converted(every, dtype)
    number = ~every.isnan()
    assert torch.equal(found.view(torch.int16)[number], every.view(torch.int16)[number])
    assert found[~number].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    """Sums of two numbers land between the numbers of the dtype, and on ties; also subnormal ones and overflows."""
    a = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    a = a[a.isfinite()]
    for shift in (0.25, 0.5, 0.75, 2.0**-10, 1.0):
        b = (a.roll(1) - a).mul(shift)
        n = a.numel()
        zeros = torch.zeros(n, 1, 1, dtype=dtype)
        call = Call(zeros[:1], zeros, a.view(n, 1, 1), torch.arange(n + 1), residual=b.view(n, 1, 1, 1))
        assert torch.equal(call.forward()[0].view(n), (a.float() + b.float()).to(dtype))


# ---------------------------------------------------------------- the same bits


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", GATES[1:])
def test_any_number_of_threads(gate: str, dtype: torch.dtype) -> None:
    lengths = (*(1 + (i * 37) % 50 for i in range(300)), 500)
    shape = {"full": (301, 3, 4, 8), "head": (301, 3, 4, 1), "channel": (4, 8), "scalar": ()}[gate]
    call = make(lengths, dtype=dtype, gate=torch.randn(shape, dtype=dtype), tail=3000)
    runs = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        runs.append(call.results())
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_see_its_batch(dtype: torch.dtype) -> None:
    """Alone, the row lies elsewhere in memory too: odd channels leave no alignment to rely on."""
    lengths = (1, 7, 0, 150, 3, 64, 65)
    call = make(lengths, d=9, dv=11, dtype=dtype)
    seeds, k, v, offsets = call.tensors
    out, lse, _ = call.forward()
    grad_out = torch.randn_like(out)
    grad_k, grad_v = call.backward(grad_out)[1:3]
    for b in range(len(lengths)):
        tokens = slice(int(offsets[b]), int(offsets[b + 1]))
        alone = Call(seeds, k[tokens].clone(), v[tokens].clone(), offsets_of(lengths[b : b + 1]))
        assert torch.equal(alone.forward()[0][0], out[b])
        assert torch.equal(alone.forward()[1][0], lse[b])
        _, row_k, row_v = alone.backward(grad_out[b : b + 1].clone())
        assert torch.equal(row_k, grad_k[tokens])
        assert torch.equal(row_v, grad_v[tokens])


# ---------------------------------------------------------------- safe


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_offsets_of_any_content(index: torch.dtype) -> None:
    """Rows are clamped to the tokens: the output is the reference's, and every gradient is written."""
    generator = torch.Generator().manual_seed(0)
    extremes = torch.tensor([torch.iinfo(index).min, torch.iinfo(index).max, -1, 0, 5, 20, 21, 22])
    for _ in range(40):
        offsets = extremes[torch.randint(8, (6,), generator=generator)].to(index)
        k = torch.randn(20, 2, 8)
        call = Call(torch.randn(3, 4, 8), k, None, offsets, skip_prefix=1)
        truth = reference.pma_pooling(call.tensors[0], k, None, offsets, None, None, *call.options)[0]
        torch.testing.assert_close(call.forward()[0], truth)
        assert all(x.isfinite().all() for x in call.backward(torch.ones_like(truth)))


def test_a_nan_stays_in_its_row_and_head() -> None:
    call = make((4, 70, 4), h=2, hk=2, tail=0)
    call.tensors[1][40, 1, 3] = torch.nan
    out, lse, _ = call.forward()
    grad_k = call.backward(torch.ones_like(out))[1]
    assert out[1, :, 1].isnan().all()
    assert lse[1, :, 1].isnan().all()
    assert grad_k[4:74, 1].isnan().all()
    clean = torch.ones_like(out, dtype=torch.bool)
    clean[1, :, 1] = False
    assert out[clean].isfinite().all()
    assert grad_k[4:74, 0].isfinite().all()
    assert grad_k[:4].isfinite().all()
    assert grad_k[74:].isfinite().all()


@pytest.mark.parametrize("pattern", ["first tile -inf", "one inf", "all -inf", "inf then nan"])
def test_infinite_scores_as_in_pytorch(pattern: str) -> None:
    k = torch.randn(130, 1, 1)
    k[:64] = -torch.inf if pattern == "first tile -inf" else k[:64]
    k[100] = torch.inf if "inf" in pattern and "one" in pattern else k[100]
    if pattern == "all -inf":
        k[:] = -torch.inf
    if pattern == "inf then nan":
        k[3], k[100] = torch.inf, torch.nan
    v = torch.randn(130, 1, 4)
    seeds = torch.ones(1, 1, 1)
    call = Call(seeds, k, v, offsets_of((130,)), scale=1.0)
    out, lse, _ = call.forward()
    s = k[:, 0, 0]
    torch.testing.assert_close(out[0, 0, 0], torch.softmax(s, 0) @ v[:, 0], equal_nan=True)
    torch.testing.assert_close(lse[0, 0, 0], torch.logsumexp(s, 0), equal_nan=True)
    grad_v = call.backward(torch.ones_like(out))[2]
    torch.testing.assert_close(grad_v[:, 0, 0], torch.softmax(s, 0), equal_nan=True)
