"""The ops of the attention family on the native module: see `csrc/cpu/attention.h` for the one kernel behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import AttentionCall, AttentionGradients, AttentionOutputs
from interformer_kernels._launch.tensors import (
    accumulation_dtype,
    broadcast_axes_as_ones,
    fitted,
    resolved,
    table_gradients,
)

TABLES = ("sinks", "position_bias", "time_bias")


def forward(call: AttentionCall, residual: Tensor | None, keep_attn_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, lse, attn_out)`; `lse` is empty without softmax, `attn_out` unless it is to be kept."""
    shape, softmax, k = call.out_shape(), call.score == "softmax", call.k
    out = k.new_empty(*shape)
    lse = k.new_empty(*(shape[:-1] if softmax else (0,)), dtype=accumulation_dtype(k.dtype))
    attn_out = k.new_empty(*(shape if keep_attn_out else (0,)), dtype=accumulation_dtype(k.dtype))
    outputs = AttentionOutputs(resolved(residual), out, lse if softmax else None, attn_out if keep_attn_out else None)
    _C.attention_forward(fitted(call, shape), outputs, torch.get_num_threads())
    return out, lse, attn_out


def backward(
    call: AttentionCall, grad_out: Tensor, attn_out: Tensor, lse: Tensor, grad_lse: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of `q, k, v, gate`, empty where an input was not given; the weights are computed without `lse`."""
    q, k, v, gate = call.q, call.k, call.v, call.gate
    dtype, exact = k.dtype, accumulation_dtype(k.dtype)
    grad_q = k.new_empty(*q.shape, dtype=exact if call.layout == "shared" else dtype)
    grad_k = k.new_empty(*k.shape)
    grad_v = k.new_empty(*((0,) if v is None else v.shape))
    # A gate that broadcasts along every axis has no axis of its own.
    grad_gate = k.new_empty((0,) if gate is None else tuple(gate.shape), dtype=exact)
    tables = table_gradients(call)
    gradients = AttentionGradients(
        grad_out=resolved(grad_out),
        attn_out=None if gate is None else resolved(attn_out),
        grad_lse=resolved(grad_lse),
        grad_q=grad_q,
        grad_k=grad_k,
        grad_v=None if v is None else grad_v,
        grad_gate=None if gate is None else broadcast_axes_as_ones(grad_gate, grad_out.dim()),
        **{f"grad_{name}": grad for name, grad in zip(TABLES, tables, strict=True) if getattr(call, name) is not None},
    )
    _C.attention_backward(fitted(call, tuple(grad_out.shape)), gradients, torch.get_num_threads())
    return grad_q.to(dtype), grad_k, grad_v, grad_gate.to(dtype), *tables
