"""Jagged attention on the CUDA part."""

from __future__ import annotations

from interformer_kernels._cuda import _attention
from interformer_kernels._launch import jagged_attention

forward, backward = jagged_attention.launcher(_attention)
