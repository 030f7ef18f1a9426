"""Jagged attention on the native module."""

from __future__ import annotations

from interformer_kernels._cpu import _attention
from interformer_kernels._launch import jagged_attention

forward, backward = jagged_attention.launcher(_attention)
