"""PMA pooling on the native module: see `csrc/cpu/pma_pooling.h` for the kernel."""

from __future__ import annotations

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
    keep_attended: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, lse, attended)`; `lse` is empty without softmax, `attended` unless it is to be kept."""
    k, v = readable(k), None if v is None else readable(v)
    shape = (offsets.shape[0] - 1, seeds.shape[0], seeds.shape[1], (k if v is None else v).shape[2])
    softmax = score == "softmax"
    keep = keep_attended and (gate is not None or residual is not None)
    out = k.new_empty(shape)
    lse = k.new_empty(shape[:3] if softmax else 0, dtype=accumulation_dtype(k.dtype))
    attended = k.new_empty(shape if keep else 0)
    _C.pma_pooling_forward(
        resolved(seeds),
        k,
        v,
        offsets,
        expanded(gate, shape),
        None if residual is None else resolved(residual),
        scale,
        skip_prefix,
        score,
        post_scale,
        gate_form,
        gate_activation,
        out,
        lse if softmax else None,
        attended if keep else None,
        torch.get_num_threads(),
    )
    return out, lse, attended


def backward(
    grad_out: Tensor,
    attended: Tensor,
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
    """Gradients of `seeds, k, v, gate`, empty for an input that was not given; the kernel does without `lse`."""
    k, v = readable(k), None if v is None else readable(v)
    grad_seeds, grad_k, grad_v, grad_gate = (k.new_empty(0 if x is None else x.shape) for x in (seeds, k, v, gate))
    _C.pma_pooling_backward(
        resolved(grad_out),
        None if gate is None else resolved(attended),
        resolved(seeds),
        k,
        v,
        offsets,
        expanded(gate, tuple(grad_out.shape)),
        scale,
        skip_prefix,
        score,
        post_scale,
        gate_form,
        gate_activation,
        grad_seeds,
        grad_k,
        None if v is None else grad_v,
        None if gate is None else broadcast_axes_as_ones(grad_gate, grad_out.dim()),
        torch.get_num_threads(),
    )
    return grad_seeds, grad_k, grad_v, grad_gate
