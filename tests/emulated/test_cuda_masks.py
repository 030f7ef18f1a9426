"""Masks come after the map of scores: a masked key has no weight, even under a score that maps 0 to another number.

No public score does. The emulation computes the sigmoid instead of `identity`, and so does the patched reference.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from grid import case_ids
from guards import guarded_inputs

from interformer_kernels import _C, reference, testing
from interformer_kernels._launch import splits
from interformer_kernels.testing import Case

ONE = {"heads": 2, "kv_heads": 1, "head_size": 8, "value_size": 8}
SIGMOID = {"score": "identity"}
CASES = [
    Case("jagged_attention", "causal", **ONE, lengths=(5, 0, 40), options={**SIGMOID, "causal": True}),
    Case("jagged_attention", "window", **ONE, lengths=(70, 3), options={**SIGMOID, "window": (4, 2), "num_prefix": 2}),
    Case("pma_pooling", "v is k", **ONE, lengths=(5, 0, 37), queries=3, shared_value=True, options=SIGMOID),
    Case("gated_cross_attention", "split", **ONE, lengths=(100, 2), queries=3, options=SIGMOID),
]


@pytest.mark.parametrize("case", CASES, ids=case_ids(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_masked_key_has_no_weight(
    case: Case, dtype: torch.dtype, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and all gradients, also where keys or queries do not fill a tile."""
    for direction in ("forward", "backward"):
        monkeypatch.setattr(_C, f"cuda_attention_{direction}", getattr(emulated, f"sigmoid_attention_{direction}"))
    monkeypatch.setitem(reference.ACTIVATIONS, "identity", torch.sigmoid)
    monkeypatch.setattr(splits, "SPLIT_KV", 64)
    rows = testing.compare(case, "cuda", dtype, make=guarded_inputs)
    assert rows
    assert not [row for row in rows if not row.ok]
