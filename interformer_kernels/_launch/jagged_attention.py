"""Jagged attention: the launcher of a backend, from its attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from interformer_kernels._launch.attention_call import AttentionCall, AttentionKernels

_Rope = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool]  # cos, sin, positions, interleaved
_Masks = tuple[bool, int, int, int]  # causal, window, num_prefix
_Maps = tuple[float, str, float, str, str]  # scale, score, post_scale, gate's form and activation


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    kv_offsets: Tensor | None,
    gate: Tensor | None,
    rope: _Rope,
    masks: _Masks,
    maps: _Maps,
) -> AttentionCall:
    own, keys = (None, offsets) if kv_offsets is None else (offsets, kv_offsets)
    return AttentionCall("packed", q, k, v, own, keys, gate, *maps, 0, *rope, *masks)


def launcher(kernels: AttentionKernels) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`forward` and `backward` in the schema's order."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: Tensor,
        kv_offsets: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        positions_q: Tensor | None,
        positions_k: Tensor | None,
        gate: Tensor | None,
        residual: Tensor | None,
        scale: float,
        causal: bool,
        window_left: int,
        window_right: int,
        num_prefix: int,
        rope_interleaved: bool,
        score: str,
        post_scale: float,
        gate_form: str,
        gate_activation: str,
        keep_attn_out: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(out, lse, attn_out)`."""
        rope = cos, sin, positions_q, positions_k, rope_interleaved
        masks = causal, window_left, window_right, num_prefix
        maps = scale, score, post_scale, gate_form, gate_activation
        call = _call(q, k, v, offsets, kv_offsets, gate, rope, masks, maps)
        return kernels.forward(call, residual, keep_attn_out)

    def backward(
        grad_out: Tensor,
        attn_out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: Tensor,
        kv_offsets: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        positions_q: Tensor | None,
        positions_k: Tensor | None,
        gate: Tensor | None,
        scale: float,
        causal: bool,
        window_left: int,
        window_right: int,
        num_prefix: int,
        rope_interleaved: bool,
        score: str,
        post_scale: float,
        gate_form: str,
        gate_activation: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of `q, k, v, gate`."""
        rope = cos, sin, positions_q, positions_k, rope_interleaved
        masks = causal, window_left, window_right, num_prefix
        maps = scale, score, post_scale, gate_form, gate_activation
        call = _call(q, k, v, offsets, kv_offsets, gate, rope, masks, maps)
        return kernels.backward(call, grad_out, attn_out, lse)

    return forward, backward
