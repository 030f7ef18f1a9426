"""The declaration of attention, which three public ops share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from interformer_kernels import _backend, reference
from interformer_kernels import _checks as checks
from interformer_kernels._calls import AttentionCall
from interformer_kernels._launch.tensors import accumulation_dtype
from interformer_kernels.ops import _eager
from interformer_kernels.ops._attention_options import check_contents, check_options
from interformer_kernels.ops._public import PublicOp
from interformer_kernels.ops._registered import RegisteredOp
from interformer_kernels.ops._spec import OpSpec


def _validate(op: PublicOp, call: AttentionCall) -> None:
    if not checks.validates(call.k.device):
        return
    sides = (
        ("q_offsets", "positions_q", call.q, call.q_offsets),
        ("kv_offsets", "positions_k", call.k, call.kv_offsets),
    )
    for name, _, x, offsets in sides:
        if offsets is not None:
            checks.check_offsets_content(op.name, op.offsets_name(call, name), offsets, x.shape[0])
    check_contents(op, call)
    if call.cos is None:
        return
    table_rows = call.cos.shape[0]
    for name, positions_name, _, offsets in sides:
        positions = getattr(call, positions_name)
        if positions is not None:
            rows = call.kv_offsets if offsets is None else offsets
            named = f"rope_positions ({positions_name})"
            checks.check_positions_content(op.name, named, positions, rows, table_rows)
        elif offsets is not None:
            checks.check_rows_fit_tables(op.name, op.offsets_name(call, name), offsets, table_rows)


def _empty_saved(call: AttentionCall, out: Tensor, keep_attn_out: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised `lse` and `attn_out`; an empty tensor for what is not asked.

    `attn_out` is A before gate and residual, in the dtype of accumulation: rounded to 16 bits it could overflow where
    the output does not, and sums over many tokens would show the rounding.
    """
    dtype = accumulation_dtype(out.dtype)
    lse = out.new_empty(out.shape[:-1] if call.score == "softmax" else (0,), dtype=dtype)
    return lse, out.new_empty(out.shape if keep_attn_out else (0,), dtype=dtype)


def _backward_reads_attn_out(op: str, backend: str, call: AttentionCall) -> bool:
    """Whether a call's backward needs A itself: for a gate's gradient, or for the softmax's `delta = <dA, A>`.

    Kernels that have all probabilities of a query at hand find delta from those, or make a sum over them first.
    """
    if call.gate is not None:
        return True
    if call.score != "softmax" or call.k.dtype.itemsize != 2:
        return False
    return (backend or _chosen(op, call.k.device.type, call.k.dtype)) == "triton"


def _chosen(op: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend for heads of any size, as far as the question is Triton; the compiler cannot trace the choice."""
    return _backend.choose(op, device_type, dtype)


# As torch.compiler.assume_constant_result sets it; importing that function would take a second.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _flops(call: AttentionCall) -> int:
    """Two multiply-adds of the scores and of the weighted sum, as `torch.utils.flop_counter` counts SDPA."""
    value_size = (call.k if call.v is None else call.v).shape[2]
    return int(2 * _pairs(call) * call.q.shape[-2] * (call.q.shape[-1] + value_size))


def _pairs(call: AttentionCall) -> int:
    """Query-key pairs over all rows, masks not counted.

    Without real offsets (fake tensors) every row is taken to have the mean length.
    """
    offsets, rows = call.kv_offsets, call.kv_offsets.shape[0] - 1
    shape = call.out_shape()
    if isinstance(offsets, FakeTensor) or offsets.is_meta:
        queries = shape[0] if call.layout == "packed" else shape[0] * shape[1]
        return int(call.k.shape[0]) * int(queries) // max(rows, 1)
    keys = offsets.diff()
    if call.layout == "packed":
        return int((keys * (keys if call.q_offsets is None else call.q_offsets.diff())).sum())
    return int(keys.sum()) * shape[1]


ATTENTION = OpSpec(
    "attention",
    AttentionCall,
    {"packed": "Tq H Dv", "dense": "B N H Dv", "shared": "B M H Dv"},
    reference=reference.attention,
    validate=_validate,
    flops=_flops,
    backward_over_forward=2.5,  # five matrix products against two: scores again, dV, dP, dQ, dK
    check_options=check_options,
    saved=("lse", "attn_out"),
    empty_saved=_empty_saved,
    reads_attn_out=_backward_reads_attn_out,
)
registered = RegisteredOp(ATTENTION, _eager.forward, _eager.backward)
