"""Whether float32 may lose bits on a GPU is PyTorch's setting, however it was made."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import warnings; warnings.simplefilter("ignore")
import torch
from interformer_kernels._launch.tensors import allows_tf32
backends = torch.backends
{}
print(*(allows_tf32(dtype) for dtype in (torch.float32, torch.bfloat16)))
"""


@pytest.mark.parametrize(
    ("switch", "allowed"),
    [
        ("pass", False),
        ("backends.cuda.matmul.allow_tf32 = True", True),
        ("backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("backends.fp32_precision = 'tf32'", True),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.set_float32_matmul_precision('medium')", True),
        ("torch.set_float32_matmul_precision('high'); torch.set_float32_matmul_precision('highest')", False),
        ("backends.cuda.matmul.fp32_precision = 'tf32'; torch.set_float32_matmul_precision('highest')", False),
        ("backends.fp32_precision = 'tf32'; backends.cuda.matmul.fp32_precision = 'ieee'", False),
        ("backends.fp32_precision = 'ieee'; backends.cuda.matmul.fp32_precision = 'tf32'", True),
        ("backends.cuda.matmul.allow_tf32 = True; backends.cuda.matmul.allow_tf32 = False", False),
        ("backends.cudnn.allow_tf32 = True", False),
    ],
)
def test_every_switch_is_followed(switch: str, allowed: bool) -> None:
    """Each in a process of its own: PyTorch's switches leave traces in one another."""
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(switch)], capture_output=True, text=True, check=True, timeout=300
    )
    assert run.stdout.split() == [str(allowed), "False"]
