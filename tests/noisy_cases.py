"""Calls that must keep float32's budget where exponentials and divisions err as much as a GPU's may."""

from __future__ import annotations

import dataclasses

from every import EVERY
from grid import ALL_CASES

from interformer_kernels.testing import Case

# Short rows and long ones; splits that are joined; every score and gate that has an exponential.
FEW = [
    Case("jagged_attention", "short and long rows", lengths=(5, 0, 37, 1, 8), heads=2, kv_heads=1),
    Case("jagged_attention", "gate tanh", lengths=(5, 20), heads=2, kv_heads=2, gate="full", residual=True,
         options={"causal": True, "gate_activation": "tanh"}),
    Case("pma_pooling", "splits", lengths=(200, 3, 70), heads=2, kv_heads=2, head_size=32),
    Case("pma_pooling", "silu score", lengths=(40, 5), heads=2, kv_heads=2,
         options={"score": "silu", "post_scale": 0.125}),
    Case("gated_cross_attention", "jagged queries", query_lengths=(2, 3, 0, 9, 1), heads=2, kv_heads=2, gate="full",
         residual=True),
    Case("gated_cross_attention", "splits, gate silu", lengths=(130, 5), heads=2, kv_heads=2, gate="full",
         options={"gate_form": "self", "gate_activation": "silu"}),
    Case("personalized_ffn", "gelu", lengths=(5, 20), options={"activation": "gelu"}),
    Case("personalized_ffn", "silu", lengths=(5, 20), options={"activation": "silu"}),
]  # fmt: skip
# The slow backends get two heads instead of four.
ASKED = FEW + [
    dataclasses.replace(case, heads=2, kv_heads=2) if case.heads == case.kv_heads else case
    for case in (ALL_CASES if EVERY else [])
]
