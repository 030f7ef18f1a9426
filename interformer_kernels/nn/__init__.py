"""Modules with parameters, made of the operations: drop-in for `torch.nn.MultiheadAttention` and its kin."""

from interformer_kernels.nn.gated_cross_attention import GatedCrossAttention
from interformer_kernels.nn.jagged_self_attention import JaggedSelfAttention
from interformer_kernels.nn.personalized_ffn import PersonalizedFFN
from interformer_kernels.nn.pma_pooling import PMAPooling

__all__ = ["GatedCrossAttention", "JaggedSelfAttention", "PMAPooling", "PersonalizedFFN"]
