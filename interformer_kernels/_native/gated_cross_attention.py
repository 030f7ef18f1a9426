"""Gated cross attention on the native module."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels._native import _attention
from interformer_kernels._native._attention import AttentionCall


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor,
    q_offsets: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    scale: float,
    score: str,
    post_scale: float,
    gate_form: str,
    gate_activation: str,
    keep_attended: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, lse, attended)`."""
    maps = scale, score, post_scale, gate_form, gate_activation
    call = AttentionCall("dense" if q_offsets is None else "packed", q, k, v, q_offsets, kv_offsets, gate, *maps)
    return _attention.forward(call, residual, keep_attended)


def backward(
    grad_out: Tensor,
    attended: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor,
    q_offsets: Tensor | None,
    gate: Tensor | None,
    scale: float,
    score: str,
    post_scale: float,
    gate_form: str,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `q, k, v, gate`."""
    maps = scale, score, post_scale, gate_form, gate_activation
    call = AttentionCall("dense" if q_offsets is None else "packed", q, k, v, q_offsets, kv_offsets, gate, *maps)
    return _attention.backward(call, grad_out, attended)
