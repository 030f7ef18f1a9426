# ruff: noqa: E402 (the tools need Triton)
"""Predictions from machine code: a thread takes the way that a GPU's would, and bounds follow from what it counts."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

from resources import bounds, rivals
from resources.machine_code import Instruction
from resources.operands import UnknownInstructionError, lut3, permute, signed
from resources.predict import _DEVICE
from resources.walk import Kernel, Machine, Walked

# ---------------------------------------------------------------- one thread


def walked(*lines: str, constants: bytes = b"", program: int = 0) -> tuple[Machine, Walked]:
    """The machine behind these instructions, of 16 bytes each, and what was counted."""
    code = []
    for i, line in enumerate([*lines, "EXIT"]):
        guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        name, _, operands = rest.partition(" ")
        code.append(Instruction(16 * i, name, operands, 2, guard))
    machine = Machine(constants, [], 128, 10)
    return machine, Kernel(code).walk(machine, program)


def test_a_loop_runs_as_often_as_its_bound_says() -> None:
    machine, counts = walked(
        "S2R R2, SR_CTAID.X",
        "IMAD.MOV.U32 R0, RZ, RZ, RZ",
        "IADD3 R0, R0, 0x3, RZ",
        "ISETP.GE.AND P0, PT, R0, R2, PT",
        "@!P0 BRA 0x20",
        program=10,
    )
    assert machine.R[0] == 12
    assert counts.names == {"S2R": 1, "IMAD.MOV.U32": 1, "IADD3": 4, "ISETP.GE.AND": 4, "BRA": 4, "EXIT": 1}
    assert counts.stalls == 2 * 15


def test_predicates_skip_instructions_that_are_issued_all_the_same() -> None:
    machine, counts = walked(
        "ISETP.LT.AND P0, P1, RZ, 0x1, PT", "@!P0 VIADD R1, RZ, 0x5", "@P0 VIADD R2, RZ, -0x5", "@P0 EXIT P1"
    )
    assert (machine.R[1], signed(machine.R[2])) == (0, -5)
    assert counts.names["VIADD"] == 2
    assert counts.names["EXIT"] == 2  # the first one's second condition is false


@pytest.mark.parametrize(("a", "b"), [(0xFFFFFFFF, 1), (5, 7), (0x80000000, 0x80000000), (0, 0)])
def test_64_bits_are_added_and_subtracted_by_halves(a: int, b: int) -> None:
    constants = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    machine, _ = walked(
        "LDC R2, c[0x0][0x0]", "LDC R3, c[0x0][0x4]",
        "IADD3 R4, P0, R2, R3, RZ", "IMAD.X R5, RZ, RZ, RZ, P0",
        "IADD3 R6, P1, R2, -R3, RZ", "IADD3.X R7, RZ, ~RZ, RZ, P1, !PT",
        "IMAD.WIDE R8, R2, R3, RZ", "IMAD.WIDE.U32 R10, R2, R3, RZ",
        "ISETP.LT.U32.AND P2, PT, R6, R2, PT", "ISETP.LT.AND.EX P3, PT, R7, RZ, PT, P2",
        constants=constants,
    )  # fmt: skip
    pair = [machine.R[i] | machine.R[i + 1] << 32 for i in range(0, 12, 2)]
    assert pair[2] == a + b
    assert pair[3] == (a - b) % 2**64
    assert pair[4] == signed(a) * signed(b) % 2**64
    assert pair[5] == a * b
    difference = a - b
    assert machine.P[3] == (difference < a)


@pytest.mark.parametrize("divided", [0, 6, 100, 12345678, 2**31 - 1])
def test_integers_are_divided_by_the_reciprocal(divided: int) -> None:
    """The sequence by which the compiler divides by a runtime number, here 7."""
    constants = divided.to_bytes(4, "little") + (7).to_bytes(4, "little")
    machine, _ = walked(
        "LDC R0, c[0x0][0x0]", "LDC R1, c[0x0][0x4]", "I2F.U32.RP R2, R1", "MUFU.RCP R2, R2",
        "IADD3 R2, R2, 0xffffffe, RZ", "F2I.FTZ.U32.TRUNC.NTZ R5, R2", "MOV R4, RZ", "IMAD.MOV R3, RZ, RZ, -R5",
        "IMAD R3, R3, R1, RZ", "IMAD.HI.U32 R4, R5, R3, R4", "IMAD.HI.U32 R4, R4, R0, RZ",
        "IMAD.MOV R3, RZ, RZ, -R4", "IMAD R6, R1, R3, R0", "ISETP.GE.U32.AND P0, PT, R6, R1, PT",
        "@P0 IMAD.IADD R6, R6, 0x1, -R1", "@P0 VIADD R4, R4, 0x1", "ISETP.GE.U32.AND P0, PT, R6, R1, PT",
        "@P0 VIADD R4, R4, 0x1", constants=constants,
    )  # fmt: skip
    assert machine.R[4] == divided // 7


def test_bits_are_moved_as_the_manual_says() -> None:
    machine, _ = walked(
        "MOV R1, 0x80000001", "MOV R2, 0xfffffff0", "SHF.R.S32.HI R3, RZ, 0x4, R2", "SHF.R.U32.HI R4, RZ, 0x1c, R2",
        "SHF.L.U64.HI R5, R1, 0x4, R2", "SHF.R.U64 R6, R1, 0x4, R2", "LEA.HI R7, R2, R1, RZ, 0x1",
        "LEA R8, R1, R2, 0x2", "LEA.HI.X.SX32 R9, R2, RZ, 0x3, !PT", "SGXT R10, R1, 0x1", "SGXT.U32 R11, R2, 0x6",
        "VIMNMX R12, R1, R2, PT", "VIMNMX.U32 R13, R1, R2, !PT", "VIADDMNMX R14, R1, 0x1, RZ, PT",
        "LOP3.LUT P1, R15, R1, R2, RZ, 0xc0, !PT", "ISETP.GT.AND P0, PT, R1, R2, PT", "P2R R16, PR, RZ, 0x3",
        "SEL R17, R1, R2, P0", "HFMA2.MMA R18, -RZ, RZ, 0, 5.9604644775390625e-08",
    )  # fmt: skip
    found = machine.R[3:19]
    assert found == [0xFFFFFFFF, 0xF, 0xFFFFFF08, 0x08000000, 0x80000002, 0xFFFFFFF4, 0xFFFFFFFF, 0xFFFFFFFF, 0x30,
                     0x80000001, 0xFFFFFFF0, 0x80000002, 0x80000000, 2, 0xFFFFFFF0, 1]  # fmt: skip
    assert lut3(0b1100, 0b1010, 0b1111, 0xE8) == 0b1110
    assert permute(0x33221100, 0x7632, 0x77665544) == 0x77663322


def test_calls_return_and_unknown_instructions_are_refused() -> None:
    machine, counts = walked("MOV R4, 0x20", "CALL.REL.NOINC 0x40", "VIADD R1, R1, 0x1", "EXIT", "VIADD R1, R1, 0x4",
                             "RET.REL.NODEC R4 0x0")  # fmt: skip
    assert machine.R[1] == 5
    assert counts.names["EXIT"] == 1
    with pytest.raises(UnknownInstructionError, match="IMADSP R1, R2"):
        walked("IMADSP R1, R2")
    with pytest.raises(UnknownInstructionError, match="BRX R2"):
        walked("BRX R2 -0x10")


# ---------------------------------------------------------------- whole kernels

_COMPARE = """
import json
from resources import bounds, interpreted, shapes
jagged = shapes.Shape("jagged", "jagged", (104, 3, 70, 200), 2, 16)
pooling = shapes.Shape("pooling", "pma", (104, 70, 0, 1100), 2, 64, 32)
launches = [
    launch
    for shape in (jagged, pooling) for training in (False, True) for launch in shapes.record(shape, training).launches
]
for x in interpreted.tensors(tuple(launch.arguments for launch in launches)):
    if x.is_floating_point():
        x.zero_()
for launch, truth in zip(launches, interpreted.interpreted(launches)):
    ways = bounds.walked(launch, bounds.compiled(launch), 10**9)
    flops = [bounds.products_of(way.names)[0] * launch.tiles.warps for way in ways]
    print(json.dumps([launch.kernel.fn.__name__, flops, [truth.get(i, 0) for i in range(launch.grid)]]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_program_multiplies_as_much_as_the_interpreter_does() -> None:
    """Loops, early ends and the rows of programs are right: the products of each program are the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", _COMPARE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    compared = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {name for name, _, _ in compared}
    assert {"attention_forward", "attention_grad_queries", "attention_grad_keys"} <= kernels
    for name, walked_flops, truth in compared:
        assert walked_flops == truth, name
    assert sum(sum(truth) for _, _, truth in compared) > 0


# ---------------------------------------------------------------- bounds


def test_products_are_read_off_the_names_of_instructions() -> None:
    flops, seconds = bounds.products_of(collections.Counter({"HGMMA.64x32x16.F32.BF16": 2, "MUFU.EX2": 5}))
    assert flops == 2 * 2 * 64 * 32 * 16 / 4  # a quarter of it by each of four warps
    assert seconds == flops / bounds.WGMMA
    assert bounds.products_of(collections.Counter({"HMMA.16816.F32.BF16": 3}))[0] == 3 * 2 * 16 * 8 * 16
    assert bounds.products_of(collections.Counter({"HMMA.1688.F32.TF32": 1}))[0] == 2 * 16 * 8 * 8


def test_programs_of_a_processor_follow_from_registers_shared_memory_and_warps() -> None:
    assert bounds.resident_programs(125, 0, 4) == bounds.resident_programs(128, 0, 4) == 4
    assert bounds.resident_programs(129, 0, 4) == 3
    assert bounds.resident_programs(32, 40_960, 4) == 5
    assert bounds.resident_programs(32, 0, 8) == 8
    assert bounds.resident_programs(255, 0, 4) == 2
    assert bounds.resident_programs(32, 100_000, 4) == 2
    assert bounds.resident_programs(32, 0, 4) == 16
    assert bounds.resident_programs(16, 0, 1) == bounds.resident_programs(8, 0, 1) == 32


@pytest.mark.parametrize(
    ("length", "rows", "heads", "width", "issue"),
    [(104, 2048, 4, 16, 92), (54, 2048, 8, 8, 184), (104, 2048, 1, 64, 27)],
)
def test_the_rival_is_bound_as_it_was_counted(length: int, rows: int, heads: int, width: int, issue: int) -> None:
    """One tile of 128 queries and keys for each row and head: the figures of the count that its constants are from."""
    found = rivals.rival("forward", [(length, length)] * rows, heads, width, 4 * rows * length, _DEVICE)
    assert found is not None
    assert found.bound == pytest.approx(issue, rel=0.05)
    assert found.expected == pytest.approx(found.bound / rivals.REACHED["forward"], rel=0.01)


def test_a_rival_that_was_not_counted_is_not_predicted() -> None:
    assert rivals.rival("forward", [(8, 8)], 1, 256, 32, _DEVICE) is None
    assert rivals.rival("backward", [(8, 8)], 1, 128, 32, _DEVICE) is None
