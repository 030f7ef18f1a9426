"""Modules with parameters, built on the ops: drop-in replacements for `torch.nn.MultiheadAttention` and others."""

from interformer_kernels.nn.bias import RelativePositionBias, TimeBias
from interformer_kernels.nn.gated_cross_attention import GatedCrossAttention
from interformer_kernels.nn.hstu import hstu_attention
from interformer_kernels.nn.jagged_self_attention import JaggedSelfAttention
from interformer_kernels.nn.personalized_ffn import PersonalizedFFN
from interformer_kernels.nn.pma_pooling import PMAPooling

__all__ = [
    "GatedCrossAttention",
    "JaggedSelfAttention",
    "PMAPooling",
    "PersonalizedFFN",
    "RelativePositionBias",
    "TimeBias",
    "hstu_attention",
]
