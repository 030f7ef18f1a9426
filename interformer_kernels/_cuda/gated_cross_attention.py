"""Gated cross attention on the CUDA part."""

from __future__ import annotations

from interformer_kernels._cuda import _attention
from interformer_kernels._launch import gated_cross_attention

forward, backward = gated_cross_attention.launcher(_attention)
