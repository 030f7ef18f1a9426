"""PMA pooling in Triton."""

from __future__ import annotations

from interformer_kernels._launch import pma_pooling
from interformer_kernels._triton import _attention

forward, backward = pma_pooling.launcher(_attention)
