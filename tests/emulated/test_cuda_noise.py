"""float32 keeps the budget with exponentials as inaccurate as CUDA's may be; by default the emulation's are not."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from cuda_calls import results
from every import most_draws
from grid import case_ids
from guards import guarded_inputs
from noisy_cases import ASKED, FEW

from interformer_kernels import testing
from interformer_kernels._launch import splits
from interformer_kernels.testing import Case


@pytest.mark.parametrize("case", ASKED, ids=case_ids(ASKED))
def test_float32_keeps_the_budget(case: Case, emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if "splits" in case.name:
        monkeypatch.setattr(splits, "SPLIT_KV", 64)
    emulated.configure(0, True, noise=True)
    rows = testing.compare(case, "cuda", torch.float32, make=guarded_inputs, most_draws=most_draws(4))
    assert rows
    assert not [row for row in rows if not row.ok]


def test_the_noise_is_there(emulated: ModuleType) -> None:
    """The same call with and without it: other bits."""
    inputs = guarded_inputs(FEW[0], torch.float32)
    clean = results(FEW[0].op, inputs)
    emulated.configure(0, True, noise=True)
    assert not torch.equal(results(FEW[0].op, inputs)["out"], clean["out"])
