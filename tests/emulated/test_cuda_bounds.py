"""A few calls of every op with sizes that fill no tile, for the sanitizer: tensors end where their numbers end."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from cuda_calls import SERVED, results

from interformer_kernels import testing
from interformer_kernels.testing import Case

LENGTHS = (3, 0, 70, 1)
ODD = {"lengths": LENGTHS, "heads": 2, "kv_heads": 1, "head_size": 9, "value_size": 11, "tail": 0}
WHOLE = {"lengths": LENGTHS, "heads": 2, "kv_heads": 2, "head_size": 32, "value_size": 32}
EPILOGUE = {"gate": "full", "residual": True}
CASES = [
    Case(op, name, **sizes, **({"rope": 6} if op == "apply_rotary" else EPILOGUE if op in testing.OPS[:3] else {}))
    for op in SERVED
    for name, sizes in (("odd", ODD), ("whole", WHOLE))
]
CASES.append(Case("jagged_attention", "rotated", **WHOLE, rope=24, positions=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inside(case: Case, dtype: torch.dtype, emulated: ModuleType) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    for how in ((0, True), (1, False)):
        emulated.configure(*how)
        assert results(case.op, testing.make_inputs(case, dtype))["out"].isfinite().all()
