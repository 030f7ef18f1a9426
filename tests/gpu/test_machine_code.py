"""Loops read off machine code: nested loops, classes, stalls, and the loop that matters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from resources.machine_code import Instruction, _instructions, loops, main_loop

# An outer loop of 0x10 to 0x70, a loop of products inside it at 0x20 to 0x50, and the endless loop at the end.
_CODE = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                               /* 0x000ff00000000800 */
        /*0010*/                   IMAD.MOV.U32 R0, RZ, RZ, RZ ;               /* 0x000000ffff007224 */
                                                                               /* 0x000fc400078e00ff */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;       /* 0x0000000c08047224 */
                                                                               /* 0x000fe400078e00ff */
        /*0030*/              @!P0 MUFU.EX2 R6, R6 ;                           /* 0x0000000006067308 */
                                                                               /* 0x000ea20000000800 */
        /*0040*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;         /* 0x0000000004027fae */
                                                                               /* 0x000fe2000b981a12 */
        /*0050*/               @P1 BRA 0x20 ;                                  /* 0xfffffffc00ec7947 */
                                                                               /* 0x000fea000383ffff */
        /*0060*/                   FADD R4, R4, R5 ;                           /* 0x0000000504047221 */
                                                                               /* 0x000fe20000000000 */
        /*0070*/               @P2 BRA 0x10 ;                                  /* 0xfffffffc00ec7947 */
                                                                               /* 0x000fea000383ffff */
        /*0080*/                   EXIT ;                                      /* 0x000000000000794d */
                                                                               /* 0x000fea0003800000 */
        /*0090*/                   BRA 0x90;                                   /* 0xfffffffc00fc7947 */
                                                                               /* 0x000fc0000383ffff */
"""


@pytest.fixture
def code() -> list[Instruction]:
    return list(_instructions(_CODE))


def test_instructions_have_names_operands_and_stalls(code: list[Instruction]) -> None:
    assert [instruction.address for instruction in code] == list(range(0, 0xA0, 0x10))
    assert code[3] == Instruction(0x30, "MUFU.EX2", "R6, R6", 1, "@!P0")
    assert [instruction.stall for instruction in code[:3]] == [8, 2, 2]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("HGMMA.64x64x16.F32.BF16", "tensor"),
        ("LDGSTS.E.BYPASS.128", "copy"),
        ("LDG.E.128", "global"),
        ("LDSM.16.MT88.4", "matrix load"),
        ("LDS.128", "shared"),
        ("REDUX.SUM", "shuffle"),
        ("RED.E.ADD.F32", "global"),
        ("FSETP.GEU.AND", "select"),
        ("F2FP.BF16.F32.PACK_AB", "convert"),
        ("ULDC.64", "constant"),
        ("UIMAD.WIDE", "integer"),
        ("VIADD", "integer"),
    ],
)
def test_kinds_of_instructions(name: str, kind: str) -> None:
    assert Instruction(0, name, "", 1).kind == kind


def test_loops_are_found_with_the_loops_inside_them(code: list[Instruction]) -> None:
    outer, inner = loops(code)
    assert (outer.start, outer.end, outer.instructions) == (0x10, 0x70, 7)
    assert (inner.start, inner.end) == (0x20, 0x50)
    assert inner.classes == {"tensor": 1, "special": 1, "copy": 1, "branch": 1}
    assert inner.stalls == 2 + 1 + 1 + 5


def test_the_main_loop_is_the_innermost_one_of_products(code: list[Instruction]) -> None:
    inner = main_loop(code)
    assert inner is not None
    assert (inner.start, inner.end) == (0x20, 0x50)
    assert inner.cycles(warps=4) == {"issue": 4.0, "special": 2.0, "stalls": 9.0}
    assert main_loop([instruction for instruction in code if instruction.kind != "branch"]) is None
