"""An eager call on the Triton backend is bound by Python where batches are small: its function calls are counted.

Times would depend on the machine. The counts are of functions of the package, and of the functions in C that these call
(tensors' methods among them), once kernels are compiled and found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_triton_driver
import pytest
import torch
from host_time import call_of

import interformer_kernels as ik

DRIVER = fake_triton_driver.install("sm_90")
PACKAGE = str(Path(ik.__file__).parent)
# Calls and launches of a forward, and of both passes. Fewer are welcome: write them down here.
MOST = {
    "pma_pooling": ((204, 2), (400, 5)),
    "jagged_attention": ((214, 2), (437, 7)),
    "gated_cross_attention": ((206, 2), (409, 6)),
    "personalized_ffn": ((175, 1), (364, 3)),
    "apply_rotary": ((174, 1), (299, 2)),
}


def counted(function: Callable[[], Any]) -> tuple[int, int]:
    """Function calls and launches of the third call, when nothing is left to be compiled or looked up."""
    for _ in range(2):
        function()
    calls, launches = 0, DRIVER.launches

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call") and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls, DRIVER.launches - launches


@pytest.mark.timeout(900)
@pytest.mark.parametrize("op", MOST)
def test_calls_of_functions_do_not_rise(op: str) -> None:
    """By more than a tenth, in the forward without gradients and in both passes."""
    function, leaves = call_of(op)
    previous = ik.set_validation("off")  # as on a GPU, whose offsets are trusted
    try:
        grad = torch.ones_like(function())
        with torch.no_grad():
            forward = counted(function)
        both = counted(lambda: torch.autograd.grad(function(), leaves, grad))
    finally:
        ik.set_validation(previous)
    for (calls, launches), (most_calls, most_launches) in zip((forward, both), MOST[op], strict=True):
        assert calls <= 1.1 * most_calls, (forward, both)
        assert launches <= most_launches, (forward, both)
