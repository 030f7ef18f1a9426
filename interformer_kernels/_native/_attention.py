"""The ops of the attention family on the native module: see `csrc/cpu/attention.h` for the one kernel behind them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._native._tensors import (
    accumulation_dtype,
    broadcast_axes_as_ones,
    expanded,
    readable,
    resolved,
)


class AttentionCall(NamedTuple):
    """What both directions read, in the order in which the native module reads it.

    Options that an op does not have keep their neutral values. `layout` says where a row's queries are: "packed"
    `[Tq, H, D]`, "dense" `[B, N, H, D]`, "shared" `[M, H, D]`.
    """

    layout: str
    q: Tensor
    k: Tensor
    v: Tensor | None
    q_offsets: Tensor | None
    kv_offsets: Tensor
    gate: Tensor | None
    scale: float
    score: str
    post_scale: float
    gate_form: str
    gate_activation: str
    skip_prefix: int = 0
    cos: Tensor | None = None
    sin: Tensor | None = None
    positions_q: Tensor | None = None
    positions_k: Tensor | None = None
    rope_interleaved: bool = False
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    num_prefix: int = 0

    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        channels = (self.k if self.v is None else self.v).shape[2]
        rows = (self.kv_offsets.shape[0] - 1,) if self.layout == "shared" else ()
        return (*rows, *self.q.shape[:-1], channels)

    def fitted(self, shape: tuple[int, ...]) -> AttentionCall:
        """The call with its tensors as the kernels read them, and the gate of the output's `shape` by strides of 0."""
        q, gate = resolved(self.q), expanded(self.gate, shape)
        k, v, cos, sin = readable(self.k), readable(self.v), readable(self.cos), readable(self.sin)
        if q is self.q and k is self.k and v is self.v and gate is self.gate and cos is self.cos and sin is self.sin:
            return self
        return self._replace(q=q, k=k, v=v, gate=gate, cos=cos, sin=sin)


def forward(call: AttentionCall, residual: Tensor | None, keep_attended: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, lse, attended)`; `lse` is empty without softmax, `attended` unless it is to be kept."""
    shape, softmax, k = call.out_shape(), call.score == "softmax", call.k
    out = k.new_empty(*shape)
    lse = k.new_empty(*(shape[:-1] if softmax else (0,)), dtype=accumulation_dtype(k.dtype))
    attended = k.new_empty(*(shape if keep_attended else (0,)))
    _C.attention_forward(
        call.fitted(shape),
        resolved(residual),
        out,
        lse if softmax else None,
        attended if keep_attended else None,
        torch.get_num_threads(),
    )
    return out, lse, attended


def backward(call: AttentionCall, grad_out: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `q, k, v, gate`; an input that was not given has an empty one."""
    q, k, v, gate = call.q, call.k, call.v, call.gate
    dtype, exact = k.dtype, accumulation_dtype(k.dtype)
    grad_q = k.new_empty(*q.shape, dtype=exact if call.layout == "shared" else dtype)
    grad_k = k.new_empty(*k.shape)
    grad_v = k.new_empty(*((0,) if v is None else v.shape))
    # A gate that broadcasts along every axis has no axis of its own.
    grad_gate = k.new_empty((0,) if gate is None else tuple(gate.shape), dtype=exact)
    _C.attention_backward(
        call.fitted(tuple(grad_out.shape)),
        resolved(grad_out),
        None if gate is None else resolved(attended),
        grad_q,
        grad_k,
        None if v is None else grad_v,
        None if gate is None else broadcast_axes_as_ones(grad_gate, grad_out.dim()),
        torch.get_num_threads(),
    )
    return grad_q.to(dtype), grad_k, grad_v, grad_gate.to(dtype)
