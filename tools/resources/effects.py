"""Instructions of the machine code as statements of Python, for `walk.py`.

Integers, addresses and predicates are computed as a GPU would, by expressions that `operands.py` makes; memory is
methods of the machine `m`. Floating-point numbers are zero, but for
conversions and reciprocals, by which integers are divided, and for constants that are compared.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from resources.machine_code import Instruction
from resources.operands import (
    MASK,
    REGISTER,
    UnknownInstructionError,
    address_of,
    is_predicate,
    place,
    predicate,
    set_predicate,
    split_operands,
    value_of,
)

_BYTES = {"64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}

# Instructions without an effect on control flow: their results are floating-point numbers, or there are none.
_FLOATS = {
    "FADD", "FMUL", "FFMA", "FMNMX", "FMNMX3", "FSEL", "FSET", "MUFU", "F2F", "F2FP", "HADD2", "HMUL2", "HFMA2",
    "HMNMX2", "HSET2", "FRND", "I2HP", "FSWZADD", "FCHK", "DADD", "DMUL", "DFMA", "DSETP", "LDSM", "MOVM", "HMMA",
    "HGMMA", "IMMA", "QGMMA",
}  # fmt: skip
_NOTHING = {
    "NOP", "BAR", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "NANOSLEEP", "BSSY", "BSYNC", "BREAK", "BMOV",
    "MEMBAR", "FENCE", "ERRBAR", "CCTL", "YIELD", "STSM", "RED", "UBLKCP", "UTMALDG", "UTMASTG", "UTMACMDFLUSH",
    "UTMAREDG", "CCTLL", "PREEXIT", "ACQBULK", "B2R", "SETMAXREG", "USETMAXREG", "UCGABAR_ARV", "UCGABAR_WAIT",
    "PMTRIG", "ENDCOLLECTIVE",
}  # fmt: skip


# ---------------------------------------------------------------- instructions


def _compare(kind: str, a: str, b: str) -> str:
    operator = {"LT": "<", "LE": "<=", "GT": ">", "GE": ">=", "EQ": "==", "NE": "!="}
    if kind in ("T", "F"):
        return str(kind == "T")
    if kind == "NAN":
        return f"({a} != {a} or {b} != {b})"
    if kind == "NUM":
        return f"({a} == {a} and {b} == {b})"
    unordered = len(kind) == 3 and kind.endswith("U")
    text = f"({a} {operator[kind[:2]]} {b})"
    return f"({text} or {a} != {a} or {b} != {b})" if unordered else text


def _set_both(first: str, second: str, compared: str, joined: str, other: str) -> list[str]:
    join = {"AND": "and", "OR": "or", "XOR": "!="}[joined]
    return [f"t = {compared}; o = {other}", set_predicate(first, f"t {join} o"),
            set_predicate(second, f"(not t) {join} o")]  # fmt: skip


def _isetp(parts: list[str], words: list[str]) -> list[str]:
    first, second, a, b, other, *extended = words
    kind, joined = parts[1], next(part for part in parts if part in ("AND", "OR", "XOR"))
    a, b = value_of(a), value_of(b)
    if "U32" not in parts:
        a, b = f"signed({a})", f"signed({b})"
    compared = _compare(kind, a, b)
    if "EX" in parts:
        low = predicate(extended[0])
        strict = {"GE": "GT", "LE": "LT"}.get(kind, kind)
        if kind == "EQ":
            compared = f"({a} == {b} and {low})"
        elif kind == "NE":
            compared = f"({a} != {b} or {low})"
        else:
            compared = f"({_compare(strict, a, b)} or ({a} == {b} and {low}))"
    return _set_both(first, second, compared, joined, predicate(other))


def _fsetp(parts: list[str], words: list[str]) -> list[str]:
    first, second, a, b, other = words[:5]
    joined = next(part for part in parts if part in ("AND", "OR", "XOR"))
    magnitude = [f"abs(as_float({value_of(x.strip('-|'))}))" if "|" in x else
                 f"{'-' if x.startswith('-') and REGISTER.match(x[1:]) else ''}as_float("
                 f"{value_of(x[1:] if x.startswith('-') and REGISTER.match(x[1:]) else x)})"
                 for x in (a, b)]  # fmt: skip
    return _set_both(first, second, _compare(parts[1], *magnitude), joined, predicate(other))


def _term(word: str) -> str:
    """A summand: its negative as the complement and one, as the carry has it."""
    if word.startswith("-") and not re.match(r"^-0x", word):
        return f"((~{value_of(word[1:])} & {MASK}) + 1)"
    return value_of(word)


def _sum(parts: list[str], words: list[str]) -> list[str]:
    target, *rest = words
    carries = []
    while is_predicate(rest[0]):
        carries.append(rest.pop(0))
    summands, inputs = rest[:3], rest[3:]
    terms = [_term(word) for word in summands]
    if "X" in parts:
        terms += [f"int({predicate(word)})" for word in inputs]
    lines = [f"t = {' + '.join(terms)}", f"{place(target)} = t & {MASK}"]
    return lines + [set_predicate(carry, f"t >> 32 > {i}") for i, carry in enumerate(carries)]


def _imad(parts: list[str], words: list[str]) -> list[str]:
    target, *rest = words
    carry_out = rest.pop(0) if is_predicate(rest[0]) else None
    a, b, c = rest[:3]
    carry = f" + int({predicate(rest[3])})" if len(rest) > 3 and is_predicate(rest[3]) else ""
    wide, high = "WIDE" in parts, "HI" in parts
    if wide or high:
        factors = [value_of(a), value_of(b)] if "U32" in parts else [f"signed({value_of(a)})", f"signed({value_of(b)})"]
        lines = [f"t = {factors[0]} * {factors[1]} + {value_of(c, True)}{carry}"]
        if high:
            return [*lines, f"{place(target)} = t >> 32 & {MASK}"]
        lines.append(f"{place(target)} = t & {MASK}; {place(target, 1)} = t >> 32 & {MASK}")
        return lines + ([set_predicate(carry_out, "t >> 64 > 0")] if carry_out else [])
    lines = [f"t = {value_of(a)} * {value_of(b)} + {value_of(c)}{carry}", f"{place(target)} = t & {MASK}"]
    return lines + ([set_predicate(carry_out, "t >> 32 > 0")] if carry_out else [])


def _lea(parts: list[str], words: list[str]) -> list[str]:
    target, *rest = words
    carry_out = rest.pop(0) if is_predicate(rest[0]) else None
    carry = f" + int({predicate(rest.pop())})" if is_predicate(rest[-1]) else ""
    shift = f"({value_of(rest.pop())} & 63)"
    a, b = value_of(rest[0]), value_of(rest[1])
    if "HI" in parts:
        high = f"{value_of(rest[2])} << 32" if len(rest) > 2 else "0"
        whole = f"signed({a})" if "SX32" in parts else f"({a} | {high})"
        shifted = f"({whole} << {shift} >> 32 & {MASK})"
    else:
        shifted = f"({a} << {shift} & {MASK})"
    lines = [f"t = {shifted} + {_term(rest[1]) if rest[1].startswith('-') else b}{carry}",
             f"{place(target)} = t & {MASK}"]  # fmt: skip
    return lines + ([set_predicate(carry_out, "t >> 32 > 0")] if carry_out else [])


def _shift(parts: list[str], words: list[str]) -> list[str]:
    target, low, by, high = words[:4]
    whole = f"({value_of(high)} << 32 | {value_of(low)})"
    if "S32" in parts or "S64" in parts:
        whole = f"signed64({whole})"
    if "U32" in parts and "HI" not in parts and "L" in parts:
        whole = value_of(low)
    shifted = f"{whole} {'<<' if 'L' in parts else '>>'} ({value_of(by)} & 63)"
    return [f"{place(target)} = ({shifted}){' >> 32' if 'HI' in parts else ''} & {MASK}"]


def _lop3(parts: list[str], words: list[str]) -> list[str]:
    predicate = words.pop(0) if is_predicate(words[0]) else None
    target, a, b, c, table, *_ = words
    lines = [f"t = lut3({value_of(a)}, {value_of(b)}, {value_of(c)}, {int(table, 16)})", f"{place(target)} = t"]
    return lines + ([set_predicate(predicate, "t != 0")] if predicate else [])


def _plop3(parts: list[str], words: list[str]) -> list[str]:
    first, second, a, b, c, table, other = words
    index = f"(int({predicate(a)}) << 2 | int({predicate(b)}) << 1 | int({predicate(c)}))"
    return [f"t = {index}", set_predicate(first, f"bool({int(table, 16)} >> t & 1)"),
            set_predicate(second, f"bool({int(other, 16)} >> t & 1)")]  # fmt: skip


def _minmax(parts: list[str], words: list[str]) -> list[str]:
    target, *values, which = words
    added = parts[0].startswith("VIADD")
    numbers = [value_of(word) for word in values]
    if added:
        numbers = [f"({numbers[0]} + {numbers[1]} & {MASK})", numbers[2]]
    if "U32" not in parts:
        numbers = [f"signed({number})" for number in numbers]
    joined = ", ".join(numbers)
    return [f"{place(target)} = (min({joined}) if {predicate(which)} else max({joined})) & {MASK}"]


def _move(parts: list[str], words: list[str]) -> list[str]:
    return [f"{place(words[0])} = {value_of(words[1])}"]


def _load_constant(parts: list[str], words: list[str]) -> list[str]:
    size = next((_BYTES[part] for part in parts if part in _BYTES), 4)
    if size == 8:
        return [f"t = {value_of(words[1], True)}",
                f"{place(words[0])} = t & {MASK}; {place(words[0], 1)} = t >> 32"]  # fmt: skip
    return [f"{place(words[0])} = {value_of(words[1])} & {(1 << 8 * size) - 1}"]


def _load(parts: list[str], words: list[str]) -> list[str]:
    size = next((_BYTES[part] for part in parts if part in _BYTES), 4)
    places = [word for word in words if not is_predicate(word)]
    address = address_of(places[1])
    source = {"LDS": f"m.load_words(m.shared, {address}, {size})", "LDL": f"m.load_words(m.local, {address}, {size})"}
    lines = [f"t = {source.get(parts[0], f'm.load({address}, {size})')}"]
    for i in range(max(1, size // 4)):
        lines.append(f"{place(places[0], i)} = t >> {32 * i} & {MASK}")
    return lines


def _moved(parts: list[str], words: list[str]) -> list[str]:
    """A store, or an asynchronous copy, of global memory: its bytes, where its last operand says that it happens."""
    size = next((_BYTES[part] for part in parts if part in _BYTES), 4)
    condition = f"if {predicate(words[-1])}: " if is_predicate(words[-1]) else ""
    return [f"{condition}m.bytes += {size}"]


def _store(parts: list[str], words: list[str]) -> list[str]:
    size = next((_BYTES[part] for part in parts if part in _BYTES), 4)
    memory = "m.shared" if parts[0] == "STS" else "m.local"
    value = " | ".join(f"{place(words[1], i)} << {32 * i}" for i in range(max(1, size // 4)))
    if words[1].endswith("RZ"):
        value = "0"
    return [f"m.store_words({memory}, {address_of(words[0])}, {value}, {size})"]


def _vote(parts: list[str], words: list[str]) -> list[str]:
    vote = predicate(words[-1])
    lines = [f"t = {vote}"]
    for word in words[:-1]:
        lines.append(set_predicate(word, "t") if is_predicate(word) else f"{place(word)} = {MASK} if t else 0")
    return lines


def _shuffle(parts: list[str], words: list[str]) -> list[str]:
    predicate, target, value = words[:3]
    return [f"{place(target)} = {value_of(value)}", set_predicate(predicate, "True")]


def _sign_extension(parts: list[str], words: list[str]) -> list[str]:
    bits = f"({value_of(words[2])} & 31)"
    value = f"({value_of(words[1])} & (1 << {bits}) - 1)"
    if "U32" not in parts:
        value = f"(({value} ^ 1 << {bits} - 1) - (1 << {bits} - 1))"
    return [f"{place(words[0])} = ({value} & {MASK}) if {bits} else 0"]


def _predicates_to_register(parts: list[str], words: list[str]) -> list[str]:
    mask = int(words[3], 16)
    bits = " | ".join(f"int(P[{i}]) << {i}" for i in range(7) if mask >> i & 1) or "0"
    return [f"{place(words[0])} = {value_of(words[2])} & {~mask & MASK} | {bits}"]


def _register_to_predicates(parts: list[str], words: list[str]) -> list[str]:
    mask = int(words[2], 16)
    return [f"P[{i}] = bool({value_of(words[1])} >> {i} & 1)" for i in range(7) if mask >> i & 1]


def _to_float(parts: list[str], words: list[str]) -> list[str]:
    value = value_of(words[1])
    value = value if "U32" in parts else f"signed({value})"
    return [f"{place(words[0])} = as_bits(float({value}))"]


def _atomic(parts: list[str], words: list[str]) -> list[str]:
    places = [word for word in words if not is_predicate(word)]
    lines = [f"t = m.atomic({address_of(places[1])})", f"{place(places[0])} = t & {MASK}"]
    return [*lines, f"{place(places[0], 1)} = t >> 32 & {MASK}"] if "64" in parts else lines


def _clear_pair(parts: list[str], words: list[str]) -> list[str]:
    return [f"{place(words[0])} = 0"] + ([] if "32" in parts else [f"{place(words[0], 1)} = 0"])


def _select(parts: list[str], words: list[str]) -> list[str]:
    return [f"{place(words[0])} = {value_of(words[1])} if {predicate(words[3])} else {value_of(words[2])}"]


def _half_constant(words: list[str]) -> list[str]:
    """HFMA2 of zeros is how a constant is made."""
    high, low = (int.from_bytes(struct.pack("<e", float(word)), "little") for word in words[3:5])
    return [f"{place(words[0])} = {high << 16 | low}"]


_EFFECTS: dict[str, Callable[[list[str], list[str]], list[str]]] = {
    "MOV": _move, "UMOV": _move, "R2UR": _move, "S2R": lambda p, w: [f"{place(w[0])} = m.special({w[1]!r})"],
    "S2UR": lambda p, w: [f"{place(w[0])} = m.special({w[1]!r})"], "CS2R": _clear_pair,
    "LDC": _load_constant, "ULDC": _load_constant, "LDCU": _load_constant,
    "IADD3": _sum, "UIADD3": _sum,
    "VIADD": lambda p, w: [f"{place(w[0])} = ({value_of(w[1])} + {value_of(w[2])}) & {MASK}"],
    "IMAD": _imad, "UIMAD": _imad, "LEA": _lea, "ULEA": _lea, "SHF": _shift, "USHF": _shift,
    "LOP3": _lop3, "ULOP3": _lop3, "PLOP3": _plop3, "UPLOP3": _plop3, "ISETP": _isetp, "UISETP": _isetp,
    "FSETP": _fsetp, "SEL": _select, "USEL": _select, "FSEL": _select, "VIMNMX": _minmax, "IMNMX": _minmax,
    "UIMNMX": _minmax, "VIMNMX3": _minmax, "VIADDMNMX": _minmax, "SGXT": _sign_extension, "USGXT": _sign_extension,
    "PRMT": lambda p, w: [f"{place(w[0])} = permute({value_of(w[1])}, {value_of(w[2])}, {value_of(w[3])})"],
    "UPRMT": lambda p, w: [f"{place(w[0])} = permute({value_of(w[1])}, {value_of(w[2])}, {value_of(w[3])})"],
    "IABS": lambda p, w: [f"{place(w[0])} = abs(signed({value_of(w[1])}))"],
    "FLO": lambda p, w: [f"{place(w[0])} = leading_one({value_of(w[1])})"],
    "UFLO": lambda p, w: [f"{place(w[0])} = leading_one({value_of(w[1])})"],
    "POPC": lambda p, w: [f"{place(w[0])} = bin({value_of(w[1])}).count('1')"],
    "UPOPC": lambda p, w: [f"{place(w[0])} = bin({value_of(w[1])}).count('1')"],
    "BREV": lambda p, w: [f"{place(w[0])} = int(f'{{{value_of(w[1])}:032b}}'[::-1], 2)"],
    "P2R": _predicates_to_register, "R2P": _register_to_predicates, "I2F": _to_float, "I2FP": _to_float,
    "F2I": lambda p, w: [f"{place(w[0])} = to_integer({value_of(w[1])}, {'U32' not in p})"],
    "VOTE": _vote, "VOTEU": _vote, "SHFL": _shuffle, "REDUX": _move, "CREDUX": _move,
    "LDG": _load, "LD": _load, "LDS": _load, "LDL": _load, "STS": _store, "STL": _store,
    "STG": _moved, "ST": _moved, "LDGSTS": _moved, "ATOMG": _atomic, "ATOM": _atomic, "ATOMS": _atomic,
    "ELECT": lambda p, w: [set_predicate(w[0], "True")],
    "SYNCS": lambda p, w: [set_predicate(w[0], "True")] if is_predicate(w[0]) else [],
}  # fmt: skip


def statements(instruction: Instruction) -> list[str]:
    """The effects of an instruction on registers, predicates and memory."""
    parts, words = instruction.name.split("."), split_operands(instruction.operands)
    base = parts[0]
    if base == "MUFU" and "RCP" in parts:
        return [f"{place(words[0])} = reciprocal({value_of(words[1])})"]
    if base == "HFMA2" and words[1:3] in (["-RZ", "RZ"], ["RZ", "RZ"]) and len(words) == 5:
        return _half_constant(words)
    if base in _EFFECTS:
        return [line for line in _EFFECTS[base](parts, words) if line]
    if base in _FLOATS:
        return (
            [f"{place(words[0])} = 0"] if words and REGISTER.match(words[0]) and base not in ("HMMA", "HGMMA") else []
        )
    if base in _NOTHING:
        return []
    raise UnknownInstructionError(f"{instruction.name} {instruction.operands}")


def ends(instruction: Instruction) -> bool:
    return instruction.name.split(".")[0] in ("BRA", "EXIT", "CALL", "RET", "JMP", "BRX", "JMX", "KILL")


def jump(instruction: Instruction) -> str:
    base, words = instruction.name.split(".")[0], split_operands(instruction.operands)
    if base == "RET":
        return f"return {place(words[0].split()[0])}"
    match = re.search(r"0x([0-9a-f]+)", instruction.operands)
    if base in ("EXIT", "KILL"):
        text = "return None"
    elif base in ("BRA", "CALL", "JMP") and match is not None and "c[" not in instruction.operands:
        text = f"return {int(match[1], 16)}"
    else:
        # A jump through a table of targets: known only where a thread comes to it.
        text = f"raise UnknownInstructionError({f'{instruction.name} {instruction.operands}'!r})"
    conditions = [predicate(word) for word in words if is_predicate(word)]
    return f"if {' and '.join(conditions)}: {text}" if conditions else text
