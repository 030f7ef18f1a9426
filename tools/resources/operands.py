"""Operands of the machine code as expressions of Python, and functions of numbers that `effects.py` writes calls of.

Registers are `R`, uniform ones `U`, predicates `P` and uniform ones `Q`; constants are those of the machine `m`.
"""

from __future__ import annotations

import re
import struct

MASK = 0xFFFFFFFF


class UnknownInstructionError(ValueError):
    """An instruction whose effect on a thread's way is not known: no count of what follows would be right."""


def signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 & 1 else x


def signed64(x: int) -> int:
    return x - (1 << 64) if x >> 63 & 1 else x


def as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits & MASK))[0])


def as_bits(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def reciprocal(bits: int) -> int:
    x = as_float(bits)
    return as_bits(1 / x) if x else 0x7F800000


def to_integer(bits: int, is_signed: bool) -> int:
    x = as_float(bits)
    if x != x:
        return 0
    low, high = (-(2**31), 2**31 - 1) if is_signed else (0, MASK)
    return int(min(max(x, low), high)) & MASK


def lut3(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result & MASK


def permute(a: int, selector: int, b: int) -> int:
    both, result = a | b << 32, 0
    for i in range(4):
        which = selector >> 4 * i & 15
        byte = both >> 8 * (which & 7) & 255
        if which & 8:
            byte = 255 if byte >> 7 else 0
        result |= byte << 8 * i
    return result


def leading_one(x: int) -> int:
    return (x.bit_length() - 1) & MASK


# ---------------------------------------------------------------- operands


def split_operands(operands: str) -> list[str]:
    return [word.replace(".reuse", "").strip() for word in re.split(r",\s*", operands) if word.strip()]


REGISTER = re.compile(r"^(U?)R(\d+|Z)(\.\w+)?$")
PREDICATE = re.compile(r"^(!?)(U?)P(\d|T)$")


def is_predicate(word: str) -> bool:
    return bool(PREDICATE.match(word))


def predicate(word: str) -> str:
    match = PREDICATE.match(word)
    assert match, word
    place = f"{'Q' if match[2] else 'P'}[{7 if match[3] == 'T' else match[3]}]"
    return f"(not {place})" if match[1] else place


def set_predicate(word: str, value: str) -> str:
    match = PREDICATE.match(word)
    assert match, word
    return "" if match[3] == "T" else f"{'Q' if match[2] else 'P'}[{match[3]}] = {value}"


def place(word: str, step: int = 0) -> str:
    """The register as a target; register 256 takes what is not wanted."""
    match = REGISTER.match(word)
    assert match, word
    file = "U" if match[1] else "R"
    if match[2] == "Z":
        return f"{file}[{'79' if file == 'U' else '259'}]"
    return f"{file}[{int(match[2]) + step}]"


def value_of(word: str, pair: bool = False) -> str:
    """An expression of the bits of an operand, of 64 for a pair of registers."""
    mask = MASK | MASK << 32 if pair else MASK
    if word.startswith("-") and not re.match(r"^-[0-9.]", word):
        return f"(-{value_of(word[1:], pair)} & {mask})"
    if word.startswith("~"):
        return f"(~{value_of(word[1:], pair)} & {mask})"
    if word.startswith("|"):
        return f"abs(signed({value_of(word.strip('|'))}))"
    if match := REGISTER.match(word):
        if match[2] == "Z":
            return "0"
        low, high = place(word), place(word, 1)
        return f"({low} | {high} << 32)" if pair else low
    if match := re.match(r"^c\[0x0\]\[(0x[0-9a-f]+)\](\.\w+)?$", word):
        return f"m.constant({match[1]}, {8 if pair else 4})"
    if match := re.match(r"^c\[0x0\]\[(U?R\d+)\+?(0x[0-9a-f]+)?\]", word):
        return f"m.constant({place(match[1])} + {match[2] or 0}, {8 if pair else 4})"
    if re.match(r"^-?0x[0-9a-f]+$", word):
        return str(int(word, 16) & mask)
    if word in ("SRZ", "PR"):
        return "0"
    try:
        return str(as_bits(float(word.replace("+INF", "inf").replace("-INF", "-inf").replace("QNAN", "nan"))))
    except ValueError:
        return "0"


def address_of(word: str) -> str:
    """The address of a memory operand, without its descriptor."""
    inner = re.sub(r"^(g?desc\[[^\]]*\])", "", word).strip("[]")
    terms = []
    for term in re.findall(r"[+-]?[^+-]+", inner.replace(" ", "")):
        sign, term = ("-", term[1:]) if term[0] == "-" else ("", term.lstrip("+"))
        register = term.split(".")[0]
        wide = ".64" in term
        scale = re.search(r"\.X(\d+)", term)
        terms.append(f"{sign}({value_of(register, wide)}){'*' + scale[1] if scale else ''}")
    return "(" + " + ".join(terms) + ")"
