"""The count of a training step's launches and bytes beside the attention kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
sys.path.append(str(Path(__file__).parents[2] / "tools"))
from resources import model_step


def test_a_step_is_counted_by_kind() -> None:
    work = model_step.eager(torch.bfloat16, 2048, 104)
    launches = {kind: sum(one.launches for one in work if one.kind == kind) for kind in {one.kind for one in work}}
    assert (
        launches[model_step.KERNELS] == 20
    )  # forward and backward of three layers' attention and feed-forward, four pools
    assert launches["layer norm"] == 18
    assert launches["products"] == 27  # three of MaskNet and two of a layer, and as many twice in the backward
    in_float32 = model_step.eager(torch.float32, 2048, 104)
    products = [sum(one.bytes for one in each if one.kind == "products") for each in (work, in_float32)]
    assert products[1] == 2 * products[0]


def test_bytes_of_a_product_are_its_matrices() -> None:
    layer, x = nn.Linear(16, 48, bias=False, device="meta"), torch.empty(100, 16, device="meta")
    with model_step.Counted(100) as counted:
        layer(x)
    assert [(one.kind, one.launches, one.bytes) for one in counted.work] == [
        ("products", 1, 4 * (100 * 16 + 16 * 48 + 100 * 48))
    ]
