"""The ops of the attention family on the native module: see `csrc/cpu/attention.h` for the one kernel behind them."""

from __future__ import annotations

import dataclasses

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


@dataclasses.dataclass(slots=True)
class Attention:
    """One call in the native module's terms; options that an op does not have keep their neutral values.

    `layout` says where a row's queries are: "packed" `[Tq, H, D]`, "dense" `[B, N, H, D]`, "shared" `[M, H, D]`.
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

    def __post_init__(self) -> None:
        self.k = readable(self.k)
        self.v = None if self.v is None else readable(self.v)
        self.q = resolved(self.q)
        if self.cos is not None and self.sin is not None:
            self.cos, self.sin = readable(self.cos), readable(self.sin)

    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output."""
        channels = (self.k if self.v is None else self.v).shape[2]
        rows = (self.kv_offsets.shape[0] - 1,) if self.layout == "shared" else ()
        return (*rows, *self.q.shape[:-1], channels)

    def _arguments(self, shape: tuple[int, ...]) -> tuple[object, ...]:
        tensors = self.layout, self.q, self.k, self.v, self.q_offsets, self.kv_offsets, self.skip_prefix
        rope = self.cos, self.sin, self.positions_q, self.positions_k, self.rope_interleaved
        masks = self.causal, self.window_left, self.window_right, self.num_prefix
        maps = self.scale, self.post_scale, self.score, self.gate_form, self.gate_activation
        return (*tensors, *rope, *masks, expanded(self.gate, shape), *maps)

    def forward(self, residual: Tensor | None, keep_attended: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`(out, lse, attended)`; `lse` is empty without softmax, `attended` unless it is to be kept."""
        shape, softmax = self.out_shape(), self.score == "softmax"
        out = self.k.new_empty(shape)
        lse = self.k.new_empty(shape[:-1] if softmax else 0, dtype=accumulation_dtype(self.k.dtype))
        attended = self.k.new_empty(shape if keep_attended else 0)
        _C.attention_forward(
            *self._arguments(shape),  # type: ignore[arg-type, call-arg]
            None if residual is None else resolved(residual),
            out,
            lse if softmax else None,
            attended if keep_attended else None,
            torch.get_num_threads(),
        )
        return out, lse, attended

    def backward(self, grad_out: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of `q, k, v, gate`; an input that was not given has an empty one."""
        dtype, exact = self.k.dtype, accumulation_dtype(self.k.dtype)
        grad_q = torch.empty(self.q.shape, dtype=exact if self.layout == "shared" else dtype)
        grad_k = self.k.new_empty(self.k.shape)
        grad_v = self.k.new_empty(0 if self.v is None else self.v.shape)
        grad_gate = self.k.new_empty(0 if self.gate is None else self.gate.shape, dtype=exact)
        _C.attention_backward(
            *self._arguments(tuple(grad_out.shape)),  # type: ignore[arg-type, call-arg]
            resolved(grad_out),
            None if self.gate is None else resolved(attended),
            grad_q,
            grad_k,
            None if self.v is None else grad_v,
            None if self.gate is None else broadcast_axes_as_ones(grad_gate, grad_out.dim()),
            torch.get_num_threads(),
        )
        return grad_q.to(dtype), grad_k, grad_v, grad_gate.to(dtype)
