"""Whether float32 may lose bits on a GPU is PyTorch's setting, however it was made."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Forks after the one import of torch, which takes seconds; each switch is set in a child.
_PROGRAM = """
import os, sys
import warnings; warnings.simplefilter("ignore")
import torch
from interformer_kernels._launch.tensors import allows_tf32
backends = torch.backends
for switch in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(switch)
        print(*(allows_tf32(dtype) for dtype in (torch.float32, torch.bfloat16)), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, switch
"""

SWITCHES = {
    "pass": False,
    "backends.cuda.matmul.allow_tf32 = True": True,
    "backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "backends.fp32_precision = 'tf32'": True,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('medium')": True,
    "torch.set_float32_matmul_precision('high'); torch.set_float32_matmul_precision('highest')": False,
    "backends.cuda.matmul.fp32_precision = 'tf32'; torch.set_float32_matmul_precision('highest')": False,
    "backends.fp32_precision = 'tf32'; backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "backends.fp32_precision = 'ieee'; backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "backends.cuda.matmul.allow_tf32 = True; backends.cuda.matmul.allow_tf32 = False": False,
    "backends.cudnn.allow_tf32 = True": False,
}


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """The answers under each switch, each in a process of its own: PyTorch's switches leave traces in one another."""
    run = subprocess.run([sys.executable, "-c", _PROGRAM, *SWITCHES], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return dict(zip(SWITCHES, run.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_is_followed(switch: str, answers: dict[str, str]) -> None:
    assert answers[switch].split() == [str(SWITCHES[switch]), "False"]
