"""Gated cross attention: the launcher of a backend, from its attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from interformer_kernels._launch.attention_call import AttentionCall, AttentionKernels


def launcher(kernels: AttentionKernels) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`forward` and `backward` in the schema's order."""

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
        keep_attn_out: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(out, lse, attn_out)`."""
        maps = scale, score, post_scale, gate_form, gate_activation
        call = AttentionCall("dense" if q_offsets is None else "packed", q, k, v, q_offsets, kv_offsets, gate, *maps)
        return kernels.forward(call, residual, keep_attn_out)

    def backward(
        grad_out: Tensor,
        attn_out: Tensor,
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
        return kernels.backward(call, grad_out, attn_out, lse)

    return forward, backward
