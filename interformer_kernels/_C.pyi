"""The native module (csrc/module.cpp): tensors are read and written in place, as DLPack views; import torch first.

Every function raises TypeError for a wrong kind of argument (not a dense tensor in memory, a wrong dtype) and
ValueError for a wrong shape, value or device; the message names the argument, what was wanted and what was found.
"""

from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]:
    """Compiler, OpenMP, CPU instruction levels, and the CUDA part: built, for which GPUs, or why not."""

def cpu_features() -> list[str]:
    """Instruction sets of this processor that kernels could use, by the names compilers give them."""

def cuda_device_count() -> int:
    """GPUs that the CUDA part could use; 0 without one, without a driver, and where that part was not built."""

def first_bad_offset(offsets: Tensor, total: int) -> int:
    """Index of the first entry that is not 0 at the start, less than its predecessor, or beyond `total`; else -1."""

def pma_pooling_forward(
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
    out: Tensor,
    lse: Tensor | None,
    attended: Tensor | None,
    threads: int,
) -> None:
    """Writes `out`, and `lse` and `attended` where given; `gate` has the output's shape, by strides of 0 if need be."""

def pma_pooling_backward(
    grad_out: Tensor,
    attended: Tensor | None,
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
    grad_seeds: Tensor,
    grad_k: Tensor,
    grad_v: Tensor | None,
    grad_gate: Tensor | None,
    threads: int,
) -> None:
    """Writes the gradients; an axis of size 1 of `grad_gate` that the gate broadcast over is summed.

    `attended` is the ungated A, which only the gate's gradient needs.
    """
