"""Rows of queries that share rows of keys: `kv_rows` of `gated_cross_attention`.

Query rows are put in the order of their key rows. Those of one key row are then its jagged queries: they meet the same
tiles of keys, and no key is copied. Outputs are put back where their queries came from. One more row, without keys,
holds the query rows whose key row does not exist.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels._calls import AttentionCall
from interformer_kernels.ops import _eager
from interformer_kernels.ops._attention import registered
from interformer_kernels.ops._attention_options import without_idle_seed
from interformer_kernels.ops._autograd import LIBRARY, refuse_tangents
from interformer_kernels.ops._compiling import is_one
from interformer_kernels.ops._public import PublicOp

_OP = "gated_cross_attention"


class QueryOrder(NamedTuple):
    """Query tokens in the order of their key rows.

    Attributes:
        q_offsets: `[B+2]`, int64: the queries of each key row, and of the row without keys behind them.
        taken: `[Tq]`: the query token that stands at each place; None where all stand where they are.
        places: `[Tq]`: the place of each query token, the inverse of `taken`.
    """

    q_offsets: Tensor
    taken: Tensor | None
    places: Tensor | None


def attend(
    op: PublicOp, call: AttentionCall, residual: Tensor | None, kv_rows: object, backend: str | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """The public function's result for arguments as they came; `call` has the offsets of the key rows."""
    rows = _checked_rows(op, call, kv_rows)
    if not torch.compiler.is_compiling():
        refuse_tangents(op.name, (*call, residual))
    kv_offsets = call.kv_offsets
    # Checked as a call in which every query row has keys of its own.
    own, residual = op.checked(call._replace(kv_offsets=kv_offsets.new_empty(rows.shape[0] + 1)), residual)
    shape = own.out_shape()
    tokens, queries = (shape[0] * shape[1], shape[1]) if own.layout == "dense" else (shape[0], 0)
    order = _query_order(rows, kv_offsets, own.q_offsets, tokens, queries)
    token_axes = len(shape) - 2
    by_key_row = without_idle_seed(
        own._replace(
            layout="packed",
            q=_in_order(own.q, own.q.shape, order, token_axes),
            q_offsets=order.q_offsets,
            kv_offsets=torch.cat((kv_offsets, kv_offsets[-1:])),
            gate=_in_order(own.gate, shape, order, token_axes),
            times_q=_in_order(own.times_q, shape[:-2], order, token_axes),
            queries_apart=True,
        )
    )
    residual = _in_order(residual, shape, order, token_axes)
    result = _eager.attention(op, by_key_row, residual, backend, return_lse)
    if result is None:
        result = registered(op, by_key_row, residual, backend, return_lse)
    if isinstance(result, tuple):
        return _put_back(result[0], shape, order), _put_back(result[1], shape[:-1], order)
    return _put_back(result, shape, order)


def _checked_rows(op: PublicOp, call: AttentionCall, kv_rows: object) -> Tensor:
    """`kv_rows`, its kind and shape checked, and those of the offsets that it is to be compared with."""
    q, q_offsets = call.q, call.q_offsets
    checks.check_floats(op.name, "q", {"q": q})
    checks.check_offsets(op.name, "kv_offsets", call.kv_offsets, q.device)
    rows = checks.check_index(op.name, "kv_rows", kv_rows, q.device)
    if q_offsets is not None:
        of_queries, where = checks.check_offsets(op.name, "q_offsets", q_offsets, q.device), "q_offsets"
    else:
        of_queries, where = (q.shape[0] if q.dim() == 4 else rows.shape[0]), "q"
    if rows.shape[0] != of_queries:
        wanted = f"[Bq] with Bq = {of_queries} (from {where})"
        raise ValueError(f"{op.name}: kv_rows must be {wanted}, found shape {list(rows.shape)}")
    return rows


# ---------------------------------------------------------------- the order


def _query_order(
    kv_rows: Tensor, kv_offsets: Tensor, q_offsets: Tensor | None, tokens: int, queries: int
) -> QueryOrder:
    """The order of `tokens` query tokens: of jagged rows, or of rows of `queries` tokens each."""
    given = kv_rows, kv_offsets, q_offsets, tokens, queries
    if _may_be_read(kv_rows) and len(kv_rows) and kv_rows[0] >= 0 and bool((kv_rows[1:] >= kv_rows[:-1]).all()):
        _check_contents(*given[:4])
        return QueryOrder(_row_offsets(kv_rows, len(kv_rows), *given[1:]), None, None)
    return QueryOrder(*torch.ops.interformer_kernels.order_queries(*given))


def _may_be_read(x: Tensor) -> bool:
    """Whether the program may depend on contents: nothing waits for them, and no tracer or transform forbids it."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and type(x) is Tensor
        and x.is_cpu
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )


def _order_queries(
    kv_rows: Tensor, kv_offsets: Tensor, q_offsets: Tensor | None, tokens: int, queries: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The implementation of the registered op `order_queries`; it is opaque to compilers, since it checks contents."""
    _check_contents(kv_rows, kv_offsets, q_offsets, tokens)
    key_rows, device = kv_offsets.shape[0] - 1, kv_rows.device
    rows = kv_rows.long()
    by_key_row, order = rows.where((rows >= 0) & (rows < key_rows), key_rows).sort(stable=True)
    if q_offsets is None:
        taken = (order[:, None] * queries + torch.arange(queries, device=device)).flatten()
        offsets = _row_offsets(by_key_row, len(rows), kv_offsets, None, tokens, queries)
    else:
        starts, lengths = reference.row_spans(q_offsets, tokens)
        ends = lengths[order].cumsum(0)
        ordered = torch.cat((ends.new_zeros(1), ends)).clamp(max=tokens)
        offsets = _row_offsets(by_key_row, len(rows), kv_offsets, ordered, tokens, queries)
        token = torch.arange(tokens, device=device)
        place = (torch.searchsorted(ordered, token, right=True) - 1).clamp(max=max(len(rows) - 1, 0))
        inside = token < ordered[-1]
        taken = token if not len(rows) else token.where(~inside, starts[order[place]] + token - ordered[place])
    places = torch.zeros_like(taken)  # of wrong offsets, several tokens may stand in one place
    places[taken] = torch.arange(len(taken), device=device)
    return offsets, taken, places


def _row_offsets(
    by_key_row: Tensor, rows: int, kv_offsets: Tensor, q_offsets: Tensor | None, tokens: int, queries: int
) -> Tensor:
    """Offsets of the queries of each key row, from those of the query rows in the same order."""
    every = torch.arange(kv_offsets.shape[0] + 1, device=kv_offsets.device, dtype=by_key_row.dtype)
    first = torch.searchsorted(by_key_row.contiguous(), every)
    first[-1] = rows
    return first * queries if q_offsets is None else q_offsets.long()[first]


def _check_contents(kv_rows: Tensor, kv_offsets: Tensor, q_offsets: Tensor | None, tokens: int) -> None:
    if not checks.validates(kv_rows.device):
        return
    if q_offsets is not None:
        checks.check_offsets_content(_OP, "q_offsets", q_offsets, tokens)
    key_rows = kv_offsets.shape[0] - 1
    wrong = (kv_rows < 0) | (kv_rows >= key_rows)
    if wrong.any():
        bad = int(wrong.nonzero()[0])
        wanted = f"in [0, B = {key_rows}), a row of kv_offsets"
        raise ValueError(f"{_OP}: kv_rows[{bad}] must lie {wanted}; found {int(kv_rows[bad])}")


def _fake_order(
    kv_rows: Tensor, kv_offsets: Tensor, q_offsets: Tensor | None, tokens: int, queries: int
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = kv_offsets.shape[0] + 1, tokens, tokens
    offsets, taken, places = (kv_rows.new_empty(size, dtype=torch.int64) for size in sizes)
    return offsets, taken, places


LIBRARY.define(
    "order_queries(Tensor kv_rows, Tensor kv_offsets, Tensor? q_offsets, SymInt tokens, SymInt queries)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("order_queries", _order_queries, "CompositeExplicitAutograd")
torch.library.register_fake("interformer_kernels::order_queries", _fake_order, lib=LIBRARY)


# ---------------------------------------------------------------- tensors of the queries' side


def _in_order(x: Tensor | None, shape: tuple[int, ...], order: QueryOrder, token_axes: int) -> Any:
    """`x`, which broadcasts to a tensor of query tokens of this shape, packed in the order of key rows.

    What all tokens share stays one token's.
    """
    if x is None:
        return None
    x = x[(None,) * (len(shape) - x.dim())]
    if all(map(is_one, x.shape[:token_axes])):
        return x.flatten(0, token_axes - 1)
    packed = x.expand(*shape[:token_axes], *x.shape[token_axes:]).flatten(0, token_axes - 1)
    return packed if order.taken is None else _permuted(packed, order.taken, order.places)


def _put_back(packed: Tensor, shape: tuple[int, ...], order: QueryOrder) -> Tensor:
    if order.taken is not None:
        packed = _permuted(packed, order.places, order.taken)
    return packed.reshape(shape)


def _permuted(x: Tensor, taken: Tensor | None, places: Tensor | None) -> Any:
    """`x[taken]`, of which `places` is the inverse: its gradient is the inverse permutation, where that of
    `index_select` would add up what is never two numbers."""
    if torch.compiler.is_compiling():  # strict export would keep an autograd.Function as its forward alone
        return torch.ops.interformer_kernels.permuted.default(x, taken, places)
    return _Permutation.apply(x, taken, places)  # type: ignore[no-untyped-call]


class _Permutation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, taken: Tensor, places: Tensor) -> Tensor:
        return x.index_select(0, taken)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2], inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _permuted(grad, *ctx.saved_tensors), None, None


LIBRARY.define("permuted(Tensor x, Tensor taken, Tensor places) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("permuted", lambda x, taken, places: x.index_select(0, taken), "CompositeExplicitAutograd")
torch.library.register_fake("interformer_kernels::permuted", lambda x, taken, places: x.new_empty(x.shape), lib=LIBRARY)
torch.library.register_autograd(
    "interformer_kernels::permuted",
    lambda ctx, grad: (torch.ops.interformer_kernels.permuted.default(grad, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[2], inputs[1]),
    lib=LIBRARY,
)
