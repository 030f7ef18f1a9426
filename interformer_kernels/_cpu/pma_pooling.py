"""PMA pooling on the native module."""

from __future__ import annotations

from interformer_kernels._cpu import _attention
from interformer_kernels._launch import pma_pooling

forward, backward = pma_pooling.launcher(_attention)
