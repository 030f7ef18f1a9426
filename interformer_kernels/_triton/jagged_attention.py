"""Jagged attention in Triton."""

from __future__ import annotations

from interformer_kernels._launch import jagged_attention
from interformer_kernels._triton import _attention

forward, backward = jagged_attention.launcher(_attention)
