"""The ops of the attention family on the CUDA part: see `csrc/cuda/attention.h` for the kernels behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import AttentionCall
from interformer_kernels._cuda.apply_rotary import rotated
from interformer_kernels._launch import long_rows
from interformer_kernels._launch.gate_gradient import gate_gradient, gate_sums
from interformer_kernels._launch.tensors import allows_tf32, fitted, readable

_QUEUE = 258  # int64 numbers that share work out: `kQueueSize` of csrc/cuda/queue.cuh
_GATE_BLOCK = 32  # tokens over which gradients of a gate that all tokens share are summed at once


def _made_ready(call: AttentionCall) -> AttentionCall:
    """The call without rotary tables: its queries and keys are turned; all tensors as the kernels read them."""
    if call.cos is not None and call.sin is not None:
        q = _turned(call.q, call, backwards=False, queries=True)
        k = _turned(call.k, call, backwards=False, queries=False)
        call = call._replace(q=q, k=k, cos=None, sin=None, positions_q=None, positions_k=None)
    return fitted(call._replace(q=readable(call.q)), call.out_shape())


def _turned(x: Tensor, call: AttentionCall, backwards: bool, queries: bool) -> Tensor:
    """Packed queries or keys, or their gradients, turned by the call's tables; as they are where it has none."""
    if call.cos is None or call.sin is None:
        return x
    own = call.q_offsets if queries else None
    positions = call.positions_q if queries else call.positions_k
    offsets = call.kv_offsets if own is None else own
    return rotated(x, offsets, call.cos, call.sin, positions, call.rope_interleaved, backwards)


def _pieces(call: AttentionCall, split: int, numbers: int) -> Tensor | None:
    """Room for so many numbers of each chunk, query and head; None where there are no chunks, or no numbers."""
    if not split or not numbers:
        return None
    room = long_rows.pieces(call.k.shape[0], split)
    return call.k.new_empty((room, *call.q.shape[-3:-1], numbers), dtype=torch.float32)


def forward(call: AttentionCall, residual: Tensor | None, keep_attn_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, lse, attn_out)`; `lse` is empty without softmax, `attn_out` unless it is to be kept."""
    shape, softmax, k = call.out_shape(), call.score == "softmax", call.k
    out = k.new_empty(shape)
    lse = k.new_empty(shape[:-1] if softmax else (0,), dtype=torch.float32)
    attn_out = k.new_empty(shape if keep_attn_out else (0,), dtype=torch.float32)
    if not out.numel():
        return out, lse, attn_out
    split = long_rows.split(call)
    _C.cuda_attention_forward(
        _made_ready(call),
        readable(residual),
        out,
        lse if softmax else None,
        attn_out if keep_attn_out else None,
        split,
        _pieces(call, split, shape[-1]),
        _pieces(call, split, 2),
        k.new_empty(_QUEUE, dtype=torch.int64),
        allows_tf32(k.dtype),
    )
    return out, lse, attn_out


def backward(
    call: AttentionCall, grad_out: Tensor, attn_out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `q, k, v, gate`; an input that was not given has an empty one."""
    q, k, v, gate, shape = call.q, call.k, call.v, call.gate, call.out_shape()
    softmax = call.score == "softmax"
    scaled = not softmax and call.post_scale != 1
    shared = call.layout == "shared"
    runs, parts = long_rows.runs(call) if shared else (1, 1)
    split = long_rows.split(call) if softmax or not shared else 0
    grad_q = k.new_empty((runs * parts, *q.shape) if shared else q.shape, dtype=torch.float32 if shared else k.dtype)
    grad_k, grad_v = k.new_empty(k.shape), k.new_empty((0,) if v is None else v.shape)
    sums, over_tokens, _ = (k.new_empty(0), False, False) if gate is None else gate_sums(gate, shape, _GATE_BLOCK)
    _C.cuda_attention_backward(
        _made_ready(call),
        readable(grad_out),
        attn_out if gate is not None else None,
        lse if softmax else None,
        torch.empty_like(lse) if softmax else None,
        torch.empty_like(lse) if softmax else None,
        k.new_empty(shape) if gate is not None or scaled else None,
        grad_q,
        grad_k,
        None if v is None else grad_v,
        None if gate is None else sums,
        _GATE_BLOCK if over_tokens else 1,
        split,
        _pieces(call, split, 0 if shared else k.shape[2]),
        _pieces(call, split, 2 if softmax else 0),
        parts,
        k.new_empty(_QUEUE, dtype=torch.int64),
        allows_tf32(k.dtype),
    )
    grad_q = grad_q.sum(0).to(k.dtype) if shared else _turned(grad_q, call, backwards=True, queries=True)
    grad_k = _turned(grad_k, call, backwards=True, queries=False)
    return grad_q, grad_k, grad_v, sums if gate is None else gate_gradient(gate, sums, shape)
