"""Loops of CUDA kernels: which is a tile's, what a copy takes, and that one which has grown is named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from resources import cuda_code, cuda_loops
from resources.machine_code import Instruction


def code_of(*lines: str) -> list[Instruction]:
    """Instructions of 16 bytes each: "BRA 0x10"."""
    parts = [line.partition(" ") for line in lines]
    return [Instruction(16 * i, name, operands, 1) for i, (name, _, operands) in enumerate(parts)]


# An item's loop from 0x0, a tile's from 0x10 with a loop of products over channels from 0x20, copies, and more of them.
_KERNEL = code_of(
    "IADD3 R0, R0, 0x1, RZ",
    "FADD R1, R1, R2",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "BRA 0x20",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "LDGSTS.E.BYPASS.128 [R2], [R4.64]",
    "IADD3 R4, R4, 0x10, RZ",
    "IADD3 R2, R2, 0x10, RZ",
    "LDGSTS.E.BYPASS.128 [R2], [R4.64]",
    "BRA 0x10",
    "LDGSTS.E.64 [R2], [R4.64]",
    "BRA 0x0",
    "EXIT",
)


def test_a_tile_takes_the_loop_of_products_for_every_16_channels() -> None:
    for width, steps in ((8, 1), (16, 1), (64, 4)):
        found = cuda_loops.tile_loop(_KERNEL, width)
        assert found is not None
        loop, instructions = found
        assert (loop.start, loop.end) == (0x10, 0x90)
        assert instructions == 9 + 2 * (steps - 1)
    assert cuda_loops.tile_loop(code_of("FADD R1, R1, R2", "BRA 0x0", "EXIT"), 64) is None


def test_code_for_diverged_warps_closes_no_loop() -> None:
    """It stands behind the kernel, and returns into the middle of a tile's loop."""
    code = code_of(
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "FADD R1, R1, R2",
        "BRA.DIV UR4, 0x70",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "BRA 0x0",
        "EXIT",
        "BRA 0x30",
    )
    found = cuda_loops.tile_loop(code, 16)
    assert found is not None
    assert (found[0].start, found[0].end, found[1]) == (0x0, 0x50, 6)


def test_copies_are_counted_in_a_row_and_in_loops_of_their_own() -> None:
    assert cuda_code.instructions_of_a_copy(_KERNEL) == 3
    loop = code_of("IADD3 R4, R4, 0x10, RZ", "ISETP.NE.AND P0, PT, R4, RZ, PT", "BRA 0x40",
                   "LDGSTS.E.BYPASS.128 [R2], [R4.64]", "BRA 0x0", "EXIT")  # fmt: skip
    assert cuda_code.instructions_of_a_copy(loop) == 5
    assert cuda_code.instructions_of_a_copy(code_of("LDGSTS.E.BYPASS.128 [R2], [R4.64]", "EXIT")) is None


def test_what_has_grown_is_named() -> None:
    recorded = {
        "attend<float, 16>": {"tile": 100, "per_copy": None},
        "grad_keys<float, 16>": {"tile": 50, "per_copy": 4.0},
    }
    found = {
        "attend<float, 16>": {"tile": 110, "per_copy": 9.0},
        "grad_keys<float, 16>": {"tile": 40, "per_copy": 4.5},
        "new<float>": {"tile": 1000, "per_copy": 50.0},
    }
    assert cuda_loops.rises(found, recorded) == ["grad_keys<float, 16>: per_copy has grown from 4.0 to 4.5"]


def test_without_a_compiler_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_code, "nvcc", lambda: None)
    assert cuda_loops.main([]) == 0
    assert capsys.readouterr().err == "no loops of the CUDA kernels: nvcc is not in PATH\n"
