"""float32 keeps the budget under the largest errors that a GPU's exponentials and divisions may have.

The interpreter rounds both correctly; here they err as much as the hardware documents (`noise.py`). A few cases that
take every path; with EVERY=1 every case, with all draws.
"""

from __future__ import annotations

import pytest
import torch
from every import most_draws
from grid import case_ids
from guards import guarded_inputs
from noise import put_noise
from noisy_cases import ASKED, FEW
from triton_calls import results

from interformer_kernels import testing
from interformer_kernels._launch import splits
from interformer_kernels.testing import Case


@pytest.mark.parametrize("case", ASKED, ids=case_ids(ASKED))
def test_float32_keeps_the_budget(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if "splits" in case.name:
        monkeypatch.setattr(splits, "SPLIT_KV", 64)
    put_noise(monkeypatch)
    rows = testing.compare(case, "triton", torch.float32, make=guarded_inputs, most_draws=most_draws(4))
    assert rows
    assert not [row for row in rows if not row.ok]


@pytest.mark.parametrize("case", [FEW[0], FEW[5]], ids=["softmax", "gate"])
def test_the_noise_is_where_fast_instructions_are(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit kernels use the fast instructions and change under noise; float32 uses none and keeps its bits."""
    for dtype, fast in ((torch.bfloat16, True), (torch.float32, False)):
        inputs = guarded_inputs(case, dtype)
        clean = results(case.op, inputs)
        with monkeypatch.context() as patch:
            noisy = put_noise(patch)
            found = results(case.op, inputs)
        assert bool(noisy) == fast
        same = all(torch.equal(x, found[name]) for name, x in clean.items() if name != "lse")
        assert same != fast or dtype == torch.bfloat16
