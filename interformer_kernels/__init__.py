"""Fused, trainable attention kernels for CTR models with behaviour sequences; see README.md."""

from interformer_kernels import nn
from interformer_kernels._checks import set_validation
from interformer_kernels._memory import keep_freed_memory
from interformer_kernels.nn.accelerate import Report, accelerate, register_adapter
from interformer_kernels.ops.apply_rotary import apply_rotary
from interformer_kernels.ops.gated_cross_attention import gated_cross_attention
from interformer_kernels.ops.jagged_attention import jagged_attention
from interformer_kernels.ops.jagged_softmax import jagged_softmax
from interformer_kernels.ops.jagged_weighted_sum import jagged_weighted_sum
from interformer_kernels.ops.merge_attention import merge_attention
from interformer_kernels.ops.personalized_ffn import personalized_ffn
from interformer_kernels.ops.plans import Plan, plan
from interformer_kernels.ops.pma_pooling import pma_pooling

__all__ = [
    "Plan",
    "Report",
    "accelerate",
    "apply_rotary",
    "gated_cross_attention",
    "jagged_attention",
    "jagged_softmax",
    "jagged_weighted_sum",
    "keep_freed_memory",
    "merge_attention",
    "nn",
    "personalized_ffn",
    "plan",
    "pma_pooling",
    "register_adapter",
    "set_validation",
]
