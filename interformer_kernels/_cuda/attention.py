"""The ops of the attention family on the CUDA part: see `csrc/cuda/attention.h` for the kernels behind them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from interformer_kernels import _C
from interformer_kernels._calls import AttentionCall, AttentionGradients, AttentionOutputs
from interformer_kernels._cuda.apply_rotary import rotated
from interformer_kernels._launch import splits
from interformer_kernels._launch.gate_gradient import gate_gradient, gate_sums
from interformer_kernels._launch.rotary import rotated_before
from interformer_kernels._launch.tensors import allows_tf32, fitted, readable, resolved, table_gradients

_GATE_BLOCK = 32  # tokens over which gradients of a gate that all tokens share are summed at once
# Gradients of sinks and bias tables are summed by workers: one for so many queries, at most so many, and with so many
# numbers in all their tables together.
_QUERIES_OF_WORKER, _MOST_WORKERS, _WORKER_NUMBERS = 64, 1024, 2**24
_ROPE_VECTOR = 4  # pairs of channels that the kernels rotate at once


class ForwardWorkspace(NamedTuple):
    """Memory of a forward call (partials of split rows, the tile scheduler's counter), and what its kernels rotate."""

    rotates_queries: bool
    rotates_keys: bool
    split_kv: int
    partials: Tensor | None
    partial_stats: Tensor | None
    scheduler: Tensor


class BackwardWorkspace(NamedTuple):
    """Memory of a backward call, how its sums are cut, and what its kernels rotate. `lse` is the forward's."""

    rotates_queries: bool
    rotates_keys: bool
    lse: Tensor | None
    delta: Tensor | None
    inv_row_sum: Tensor | None
    grad_attn_out: Tensor | None
    sink_sums: Tensor | None
    position_sums: Tensor | None
    time_sums: Tensor | None
    gate_block: int
    key_shards: int
    split_kv: int
    partials: Tensor | None
    partial_stats: Tensor | None
    scheduler: Tensor


def _rotates_inside(call: AttentionCall) -> bool:
    """Whether the kernels know of rotary embedding: if so, they rotate gradients back, whoever rotated the inputs."""
    if call.cos is None or call.v is None:
        return False
    return max(call.k.shape[2], call.v.shape[2]) <= _C.cuda_widest_rope and call.cos.shape[1] % _ROPE_VECTOR == 0


def _prepared(call: AttentionCall, backward: bool = False) -> tuple[AttentionCall, bool, bool]:
    """The call with all tensors as the kernels read them, and whether they rotate queries, and keys.

    What they do not rotate is rotated here; where they know of no rotary embedding, the call has no tables.
    """
    queries_inside = keys_inside = False
    if call.cos is not None and call.sin is not None:
        inside = _rotates_inside(call)
        queries_before, keys_before = rotated_before(call, inside, backward)
        q = _rotated(call.q, call, backwards=False, queries=True) if queries_before else call.q
        k = _rotated(call.k, call, backwards=False, queries=False) if keys_before else call.k
        cos, sin = _tables(call.cos, call.sin) if inside else (None, None)
        queries_inside, keys_inside = not queries_before, not keys_before
        call = call._replace(q=q, k=k, cos=cos, sin=sin)
        if not inside:
            call = call._replace(positions_q=None, positions_k=None)
    return fitted(call._replace(q=readable(call.q)), call.out_shape()), queries_inside, keys_inside


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary tables as the kernels of attention read them: of equal strides, with rows at multiples of 16 bytes."""
    cos, sin = readable(cos), readable(sin)
    strays = any(table.data_ptr() % (4 * _ROPE_VECTOR) or table.stride(0) % _ROPE_VECTOR for table in (cos, sin))
    if strays or cos.stride(0) != sin.stride(0):
        return cos.clone(memory_format=torch.contiguous_format), sin.clone(memory_format=torch.contiguous_format)
    return cos, sin


def _rotated(x: Tensor, call: AttentionCall, backwards: bool, queries: bool) -> Tensor:
    """Packed queries or keys, or their gradients, rotated by the call's tables."""
    assert call.cos is not None
    assert call.sin is not None
    q_offsets = call.q_offsets if queries else None
    positions = call.positions_q if queries else call.positions_k
    offsets = call.kv_offsets if q_offsets is None else q_offsets
    return rotated(x, offsets, call.cos, call.sin, positions, call.rope_interleaved, backwards)


def _partials(call: AttentionCall, split_kv: int, numbers: int) -> Tensor | None:
    """Memory for `numbers` numbers of each split, query and head; None where no row is split, or without numbers."""
    if not split_kv or not numbers:
        return None
    room = splits.num_partials(call.k.shape[0], split_kv)
    return call.k.new_empty((room, *call.q.shape[-3:-1], numbers), dtype=torch.float32)


def _worker_sums(call: AttentionCall) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Memory in which workers sum up gradients of sinks, position bias and time bias: `[workers, H, entries]`.

    The number of workers follows from sizes, and with it the order of the sums.
    """
    tables = call.sinks, call.position_bias, call.time_bias
    heads, queries = call.q.shape[-2], math.prod(call.out_shape()[:-2])
    entries = [0 if x is None else x.numel() // x.shape[0] for x in tables]
    room = _WORKER_NUMBERS // max(1, heads * sum(entries))
    workers = max(1, min(_MOST_WORKERS, -(-queries // _QUERIES_OF_WORKER), room))
    sums = [call.k.new_empty((workers, heads, n), dtype=torch.float32) if n else None for n in entries]
    return sums[0], sums[1], sums[2]


def _scheduler(call: AttentionCall) -> Tensor:
    """Memory of the tile scheduler."""
    return call.k.new_empty(_C.cuda_scheduler_size, dtype=torch.int64)


def forward(call: AttentionCall, residual: Tensor | None, keep_attn_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, lse, attn_out)`; `lse` is empty without softmax, `attn_out` unless it is to be kept."""
    shape, softmax, k = call.out_shape(), call.score == "softmax", call.k
    out = k.new_empty(shape)
    lse = k.new_empty(shape[:-1] if softmax else (0,), dtype=torch.float32)
    attn_out = k.new_empty(shape if keep_attn_out else (0,), dtype=torch.float32)
    if not out.numel():
        return out, lse, attn_out
    split_kv = splits.split_kv(call)
    outputs = AttentionOutputs(readable(residual), out, lse if softmax else None, attn_out if keep_attn_out else None)
    partials = _partials(call, split_kv, shape[-1]), _partials(call, split_kv, 2)
    prepared, rotates_queries, rotates_keys = _prepared(call)
    workspace = ForwardWorkspace(rotates_queries, rotates_keys, split_kv, *partials, _scheduler(call))
    _C.cuda_attention_forward(prepared, outputs, workspace, allows_tf32(k.dtype))
    return out, lse, attn_out


def backward(
    call: AttentionCall, grad_out: Tensor, attn_out: Tensor, lse: Tensor, grad_lse: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Gradients of `q, k, v, gate`; an input that was not given has an empty one."""
    q, k, v, gate, shape = call.q, call.k, call.v, call.gate, call.out_shape()
    softmax, shared = call.score == "softmax", call.layout == "shared"
    row_groups, key_shards = splits.row_groups(call) if shared else (1, 1)
    split_kv = splits.split_kv(call) if softmax or not shared else 0
    grad_q_shape = (row_groups * key_shards, *q.shape) if shared else q.shape
    grad_q = k.new_empty(grad_q_shape, dtype=torch.float32 if shared else k.dtype)
    grad_k, grad_v = k.new_empty(k.shape), k.new_empty((0,) if v is None else v.shape)
    sums, over_tokens, _ = (k.new_empty(0), False, False) if gate is None else gate_sums(gate, shape, _GATE_BLOCK)
    grad_sinks, grad_position_bias, grad_time_bias = table_gradients(call)
    gradients = AttentionGradients(
        grad_out=readable(grad_out),
        attn_out=None if gate is None else attn_out,
        grad_lse=None if grad_lse is None else resolved(grad_lse).contiguous(),
        grad_q=grad_q,
        grad_k=grad_k,
        grad_v=None if v is None else grad_v,
        grad_gate=None if gate is None else sums,
        grad_sinks=None if call.sinks is None else grad_sinks,
        grad_position_bias=None if call.position_bias is None else grad_position_bias,
        grad_time_bias=None if call.time_bias is None else grad_time_bias,
    )
    sink_sums, position_sums, time_sums = _worker_sums(call)
    prepared, rotates_queries, rotates_keys = _prepared(call, backward=True)
    workspace = BackwardWorkspace(
        rotates_queries=rotates_queries,
        rotates_keys=rotates_keys,
        lse=lse if softmax else None,
        delta=torch.empty_like(lse) if softmax else None,
        inv_row_sum=torch.empty_like(lse) if softmax else None,
        grad_attn_out=k.new_empty(shape) if gate is not None or call.scales_sum else None,
        sink_sums=sink_sums,
        position_sums=position_sums,
        time_sums=time_sums,
        gate_block=_GATE_BLOCK if over_tokens else 1,
        key_shards=key_shards,
        split_kv=split_kv,
        partials=_partials(call, split_kv, 0 if shared else k.shape[2]),
        partial_stats=_partials(call, split_kv, 2 if softmax else 0),
        scheduler=_scheduler(call),
    )
    _C.cuda_attention_backward(prepared, gradients, workspace, allows_tf32(k.dtype))
    if shared:
        grad_q = grad_q.sum(0).to(k.dtype)
    elif call.cos is not None and prepared.cos is None:
        grad_q = _rotated(grad_q, call, backwards=True, queries=True)
        grad_k = _rotated(grad_k, call, backwards=True, queries=False)
    grad_gate = sums if gate is None else gate_gradient(gate, sums, shape)
    return grad_q, grad_k, grad_v, grad_gate, grad_sinks, grad_position_bias, grad_time_bias
