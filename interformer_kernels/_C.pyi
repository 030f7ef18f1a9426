"""The native module (csrc/module.cpp). Tensors are read and written in place, as DLPack views; import torch first.

Every function raises TypeError for a wrong kind of argument (not a dense tensor in memory, a wrong dtype), ValueError
for a wrong shape, value or device; the message names the argument, what was wanted and what was found.
"""

from typing import Any

from torch import Tensor

from interformer_kernels._calls import (
    AttentionCall,
    AttentionGradients,
    AttentionOutputs,
    FfnCall,
    FfnGradients,
    FfnOutputs,
    FoldedCall,
    FoldedOutputs,
    RotaryCall,
    RotaryOutputs,
    SoftmaxCall,
    SoftmaxGradients,
    SoftmaxOutputs,
    WeightedSumCall,
    WeightedSumGradients,
    WeightedSumOutputs,
)
from interformer_kernels._cuda import attention, personalized_ffn

def build_info() -> dict[str, Any]:
    """Compiler, OpenMP, CPU instruction levels, and the CUDA part: built, for which GPUs, or why not."""

def cpu_features() -> list[str]:
    """Instruction sets of this processor that kernels could use, by the names compilers give them."""

def cuda_device_count() -> int:
    """GPUs that the CUDA part could use; 0 without one, without a driver, and where that part was not built."""

def keep_freed_memory() -> bool:
    """Makes the system's allocator keep freed memory, for good; False where it is not glibc's."""

def first_bad_offset(offsets: Tensor, total: int) -> int:
    """Index of the first entry that is not 0 at the start, less than its predecessor, or beyond `total`; else -1."""

def fields() -> dict[str, list[str]]:
    """By the tuple's class: the names of the entries that the native module reads from it, in order."""

# Each operation takes its call, and a tuple of what it writes.

def attention_forward(call: AttentionCall, outputs: AttentionOutputs, threads: int, /) -> None:
    """Writes `out`, and `lse` and `attn_out` where given; `gate` has the output's shape, by strides of 0 if need be."""

def attention_backward(call: AttentionCall, gradients: AttentionGradients, threads: int, /) -> None:
    """Writes the gradients; an axis of size 1 of `grad_gate` that the gate broadcast over is summed.

    `grad_gate`, `attn_out`, `grad_lse`, and `grad_q` of shared queries, are of the type of accumulation. `attn_out` is
    the ungated A, which only the gate's gradient needs. `grad_lse`, if given, has the output's shape without its last
    axis.
    """

# Whole eager calls of plain tensors, with new outputs; None for a call that is declined, before anything is computed.

def eager_attention_forward(
    call: AttentionCall,
    residual: Tensor | None,
    keep_lse: bool,
    keep_attn_out: bool,
    validate: bool,
    threads: int,
    /,
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
    """The output, and the log-sum-exp and the ungated A where they are to be kept.

    `scale` may be None, and `gate` and `residual` need only broadcast to the output. With `validate`, a call is also
    declined for the contents of its offsets.
    """

def eager_attention_backward(
    call: tuple[Any, ...], grad_out: Tensor, attn_out: Tensor | None, grad_lse: Tensor | None, threads: int, /
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """Gradients of q, k, v and gate; those of gates and of shared queries in the type of accumulation."""

def folded_pooling_forward(call: FoldedCall, outputs: FoldedOutputs, threads: int, /) -> None:
    """Writes `out [B, M, H, D]`, and the pooled tokens `[B, M, H, E]` where given; all inputs may have any strides."""

def personalized_ffn_forward(call: FfnCall, outputs: FfnOutputs, threads: int, /) -> None:
    """Writes `out [T, F]`."""

def personalized_ffn_backward(call: FfnCall, gradients: FfnGradients, threads: int, /) -> None:
    """Writes the gradients."""

def apply_rotary(call: RotaryCall, outputs: RotaryOutputs, threads: int, /) -> None:
    """Writes `out [T, H, D]`: x rotated, or, backwards, turned back."""

def jagged_softmax_forward(call: SoftmaxCall, outputs: SoftmaxOutputs, threads: int, /) -> None:
    """Writes `out [T, H]`."""

def jagged_softmax_backward(call: SoftmaxCall, gradients: SoftmaxGradients, threads: int, /) -> None:
    """Writes the gradient; the weights are computed again from the scores."""

def jagged_weighted_sum_forward(call: WeightedSumCall, outputs: WeightedSumOutputs, threads: int, /) -> None:
    """Writes `out [B, H, D]`."""

def jagged_weighted_sum_backward(call: WeightedSumCall, gradients: WeightedSumGradients, threads: int, /) -> None:
    """Writes the gradients."""

# The CUDA part, where it is built: the same calls for tensors on one GPU, on the caller's current stream.

cuda_scheduler_size: int
"""int64 numbers of memory, of any content, that the tile scheduler of a call needs."""

cuda_widest_rope: int
"""Channels of the widest heads that the kernels of attention rotate."""

def cuda_attention_forward(
    call: AttentionCall, outputs: AttentionOutputs, workspace: attention.ForwardWorkspace, tf32: bool, /
) -> None:
    """Writes `out`, and `lse` and `attn_out` where given.

    Rotary tables have rows of 4n numbers, aligned to 16 bytes, of equal strides. The workspace says whether queries,
    and whether keys, are rotated by the kernels; else they were rotated before.

    Rows of more than `split_kv` keys are split, where queries are not packed (0: no row is split). Their partials need
    memory: `partials [2 Tk / split_kv + 1, N, H, Dv]` and `partial_stats [..., 2]`, float32. `tf32`: float32 may be
    multiplied by tensor cores.
    """

def cuda_attention_backward(
    call: AttentionCall, gradients: AttentionGradients, workspace: attention.BackwardWorkspace, tf32: bool, /
) -> None:
    """Writes the gradients; rotary tables are as in the forward, and gradients of queries and keys are rotated back.

    It also writes to its workspace: `delta` and `inv_row_sum`, of the shape of `lse` (softmax only), and
    `grad_attn_out` of the output's shape (only with a gate, or a `post_scale` that is not 1). `grad_q` of shared
    queries holds sums over row groups and over shards of a row's keys, float32 `[row_groups * key_shards, M, H, D]`.
    `grad_gate` is as `_launch.gate_gradient.gate_sums` makes it; where blocks of tokens are summed they have
    `gate_block` tokens (else 1). Rows of more than `split_kv` keys are split as in the forward: `partials` has `D`
    channels, for dense queries alone; `partial_stats` is there only under softmax.
    """

def cuda_personalized_ffn_forward(call: FfnCall, outputs: FfnOutputs, tf32: bool, /) -> None:
    """Writes `out [T, F]`; `tf32`: float32 may be multiplied by tensor cores."""

def cuda_personalized_ffn_backward(
    call: FfnCall, gradients: FfnGradients, workspace: personalized_ffn.Workspace, tf32: bool, /
) -> None:
    """Writes the gradients, and to its workspace, unless the activation is identity, `grad_pre_activation [T, F]`.

    Rows of more than `split_tokens` tokens are split; where there are so many tokens, `partials`, float32
    `[2 T / split_tokens + 1, E F]`, or `[..., E F + F]` with a bias, is memory for the sums of each split.
    """

def cuda_apply_rotary(call: RotaryCall, outputs: RotaryOutputs, /) -> None:
    """Writes `out [T, H, D]`: x rotated, or, backwards, rotated back."""

def cuda_jagged_softmax_forward(call: SoftmaxCall, outputs: SoftmaxOutputs, /) -> None:
    """Writes `out [T, H]`."""

def cuda_jagged_softmax_backward(call: SoftmaxCall, gradients: SoftmaxGradients, /) -> None:
    """Writes the gradient; the weights are computed again from the scores."""

def cuda_jagged_weighted_sum_forward(call: WeightedSumCall, outputs: WeightedSumOutputs, /) -> None:
    """Writes `out [B, H, D]`."""

def cuda_jagged_weighted_sum_backward(call: WeightedSumCall, gradients: WeightedSumGradients, /) -> None:
    """Writes the gradients."""
