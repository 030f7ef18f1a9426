"""`kv_rows` of gated cross attention: who reads which keys, bits, errors, compilers; the values are in the grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grid import DTYPES, backends
from shared_key_calls import ROWS, SIZES, call, check_same_bits, made
from torch import Tensor

import interformer_kernels as ik
from interformer_kernels import testing

CROSS = "gated_cross_attention"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 7])
def test_a_candidate_has_the_same_bits_alone_and_among_many(dtype: torch.dtype, head_size: int) -> None:
    for backend in set(backends(CROSS, dtype)) - {"reference"}:
        check_same_bits(backend, dtype, head_size=head_size)


@pytest.mark.parametrize("query_lengths", [None, (2, 3, 0, 9, 1, 4, 1, 2, 3, 0)])
def test_rows_in_order_are_not_copied(query_lengths: tuple[int, ...] | None) -> None:
    rows = tuple(sorted(ROWS))
    given = made(kv_rows=rows, query_lengths=query_lengths, gate="full", residual=True)
    with torch.profiler.profile() as in_order:
        call(given)
    with torch.profiler.profile() as out_of_order:
        call(given, kv_rows=given["kv_rows"].flip(0))
    names = [{event.key for event in profile.key_averages()} for profile in (in_order, out_of_order)]
    assert ["_Permutation" in found for found in names] == [False, True]


def test_dropout_counts_queries_in_the_order_of_their_keys() -> None:
    options: dict[str, Any] = {"dropout_p": 0.4, "dropout_seed": 3}
    given = made(queries=1)
    order = given["kv_rows"].sort(stable=True).indices
    counts = torch.bincount(given["kv_rows"], minlength=5)
    grouped = call(
        given, q=given["q"][order, 0], kv_rows=None, q_offsets=testing.offsets_of(counts.tolist()), **options
    )
    torch.testing.assert_close(call(given, **options)[order, 0], grouped)


@pytest.mark.parametrize("backend", backends(CROSS))
@pytest.mark.parametrize("value", [-1, 5, 2**63 - 1, -(2**63)])
def test_values_out_of_range(backend: str, value: int) -> None:
    """An error that names the entry; unchecked, that row sees nothing, and others are right."""
    for rows in (ROWS, tuple(sorted(ROWS))):
        given = made(kv_rows=rows, residual=True, gate="full")
        kv_rows = given["kv_rows"].clone()
        # The lowest number follows a high one, whose difference would not fit.
        place = 6 if value > 0 and rows is ROWS else -1 if value > 0 or value == -(2**63) else 0
        kv_rows[place] = value
        index = place % len(rows)
        with pytest.raises(ValueError, match=rf"kv_rows\[{index}\] must lie in \[0, B = 5\), .*; found {value}$"):
            call(given, kv_rows=kv_rows, backend=backend)
        ik.set_validation("off")
        wanted, lse = call(given, return_lse=True, backend=backend)
        out, found_lse = call(given, kv_rows=kv_rows, return_lse=True, backend=backend)
        ik.set_validation("default")
        others = torch.arange(len(rows)) != index
        torch.testing.assert_close(out[others], wanted[others])
        torch.testing.assert_close(out[index], given["residual"][index])
        assert (found_lse[index] == -torch.inf).all()
        assert torch.equal(found_lse[others], lse[others])


def test_numbers_of_rows_must_agree() -> None:
    given = made()
    with pytest.raises(ValueError, match=r"kv_rows must be \[Bq\] with Bq = 10 \(from q\), found shape \[9\]"):
        call(given, kv_rows=given["kv_rows"][:9])
    jagged = made(query_lengths=(1,) * 10)
    with pytest.raises(ValueError, match=r"kv_rows must be \[Bq\] with Bq = 10 \(from q_offsets\), found shape \[11\]"):
        call(jagged, kv_rows=torch.zeros(11, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"kv_rows must have one axis"):
        call(given, kv_rows=given["kv_rows"][:, None])


@pytest.mark.parametrize("query_lengths", [None, (2, 3, 0, 9, 1, 4, 1, 2, 3, 0)])
def test_a_compiled_call_is_the_eager_one(query_lengths: tuple[int, ...] | None) -> None:
    """Contents are checked as in eager mode, gradients flow, and other numbers of rows need no new graph."""
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for rows in (ROWS, tuple(sorted(ROWS)), ROWS[:7]):
        lengths = None if query_lengths is None else query_lengths[: len(rows)]
        given = made(kv_rows=rows, query_lengths=lengths, gate="head", residual=True)
        wanted, found = call(given), compiled(given)
        torch.testing.assert_close(found, wanted)
        inside = wanted if lengths is None else wanted[: sum(lengths)]
        grad = torch.randn(inside.shape)
        leaves = [given[name] for name in ("q", "k", "v", "gate", "residual")]
        wanted_grads = torch.autograd.grad(inside, leaves, grad)
        for x, y in zip(torch.autograd.grad(found[: len(inside)], leaves, grad), wanted_grads, strict=True):
            torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match=r"kv_rows\[0\] must lie"):
        compiled({**given, "kv_rows": given["kv_rows"] + 5})


def test_gradients_and_second_ones() -> None:
    given = made(torch.float64, lengths=(3, 0, 5), kv_rows=(2, 0, 2, 1), queries=1, gate="full", tail=0)
    given = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in given.items() if x is not None}

    def function(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Any:
        return call(given, q=q, k=k, v=v, gate=gate)

    leaves = [given[name] for name in ("q", "k", "v", "gate")]
    torch.autograd.gradcheck(function, leaves)
    torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("backend", backends(CROSS))
def test_transforms(backend: str, rows: tuple[int, ...]) -> None:
    """Whether rows stand in order or not: reverse mode and `vmap` work, also over the rows, and `jvp` is refused."""
    given = made(torch.float64, lengths=(3, 0, 5), kv_rows=rows, gate="full", residual=True, tail=0)
    q, kv_rows = given["q"].detach(), given["kv_rows"]

    def total(q: Tensor) -> Any:
        return call(given, q=q, backend=backend).square().sum()

    leaf = q.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(q), wanted)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(torch.stack((q, q)))[1], wanted)
    batched = torch.stack((kv_rows, kv_rows.flip(0)))
    found = torch.func.vmap(lambda rows: call(given, kv_rows=rows, backend=backend))(batched)
    torch.testing.assert_close(found[1], call(given, kv_rows=batched[1], backend=backend))
    with pytest.raises(NotImplementedError, match="gated_cross_attention has no forward-mode derivative"):
        torch.func.jvp(lambda q: call(given, q=q, backend=backend), (q,), (q,))


def test_opcheck() -> None:
    kv_rows, offsets = torch.tensor(ROWS), testing.offsets_of(SIZES["lengths"])
    ops = torch.ops.interformer_kernels
    torch.library.opcheck(ops.order_queries, (kv_rows, offsets, None, 20, 2))
    q_offsets = testing.offsets_of((2,) * 10)
    torch.library.opcheck(ops.order_queries, (kv_rows.int(), offsets, q_offsets.int(), 23, 0))
    order = torch.randperm(6)
    torch.library.opcheck(ops.permuted, (torch.randn(6, 3, 2, requires_grad=True), order, order.argsort()))


def test_tensors_on_meta_give_shapes() -> None:
    given = {name: x.to("meta") for name, x in made(gate="full").items() if isinstance(x, Tensor)}
    out, lse = call(given, return_lse=True)
    assert out.shape == (10, 2, 4, 16)
    assert lse.shape == (10, 2, 4)


def test_the_module_reads_shared_keys() -> None:
    module = ik.nn.GatedCrossAttention(16, 2, batch_first=True)
    query, key = torch.randn(4, 3, 16), torch.randn(11, 16)
    offsets, rows = torch.tensor([0, 5, 5, 11]), torch.tensor([2, 0, 2, 1])
    found = module(query, key, kv_offsets=offsets, kv_rows=rows)
    parts = [key[offsets[row] : offsets[row + 1]] for row in rows]
    own = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    torch.testing.assert_close(found, module(query, torch.cat(parts), kv_offsets=own))
