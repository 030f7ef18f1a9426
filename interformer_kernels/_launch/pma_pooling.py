"""PMA pooling: the launcher of a backend, from its attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from interformer_kernels._launch.attention_call import AttentionCall, AttentionKernels


def launcher(kernels: AttentionKernels) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`forward` and `backward` in the schema's order."""

    def forward(
        seeds: Tensor,
        k: Tensor,
        v: Tensor | None,
        offsets: Tensor,
        gate: Tensor | None,
        residual: Tensor | None,
        scale: float,
        skip_prefix: int,
        score: str,
        post_scale: float,
        gate_form: str,
        gate_activation: str,
        keep_attn_out: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(out, lse, attn_out)`."""
        maps = scale, score, post_scale, gate_form, gate_activation
        call = AttentionCall("shared", seeds, k, v, None, offsets, gate, *maps, skip_prefix=skip_prefix)
        return kernels.forward(call, residual, keep_attn_out)

    def backward(
        grad_out: Tensor,
        attn_out: Tensor,
        lse: Tensor,
        seeds: Tensor,
        k: Tensor,
        v: Tensor | None,
        offsets: Tensor,
        gate: Tensor | None,
        scale: float,
        skip_prefix: int,
        score: str,
        post_scale: float,
        gate_form: str,
        gate_activation: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of `seeds, k, v, gate`."""
        maps = scale, score, post_scale, gate_form, gate_activation
        call = AttentionCall("shared", seeds, k, v, None, offsets, gate, *maps, skip_prefix=skip_prefix)
        return kernels.backward(call, grad_out, attn_out, lse)

    return forward, backward
