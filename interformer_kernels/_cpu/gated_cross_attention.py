"""Gated cross attention on the native module."""

from __future__ import annotations

from interformer_kernels._cpu import _attention
from interformer_kernels._launch import gated_cross_attention

forward, backward = gated_cross_attention.launcher(_attention)
