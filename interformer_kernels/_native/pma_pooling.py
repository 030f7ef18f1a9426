"""PMA pooling on the native module."""

from __future__ import annotations

from interformer_kernels._launch import pma_pooling
from interformer_kernels._native import _attention

forward, backward = pma_pooling.launcher(_attention)
