"""PMA pooling on the CUDA part."""

from __future__ import annotations

from interformer_kernels._cuda import _attention
from interformer_kernels._launch import pma_pooling

forward, backward = pma_pooling.launcher(_attention)
