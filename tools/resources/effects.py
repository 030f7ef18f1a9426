"""Instructions of the machine code as statements of Python, for `walk.py`.

Integers, addresses and predicates are computed as a GPU would. Registers are `R`, uniform ones `U`, predicates `P` and
uniform ones `Q`, memory and constants are methods of the machine `m`. Floating-point numbers are zero, but for
conversions and reciprocals, by which integers are divided, and for constants that are compared.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from resources.machine_code import Instruction

MASK = 0xFFFFFFFF
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


def _split(operands: str) -> list[str]:
    return [word.replace(".reuse", "").strip() for word in re.split(r",\s*", operands) if word.strip()]


_REGISTER = re.compile(r"^(U?)R(\d+|Z)(\.\w+)?$")
_PREDICATE = re.compile(r"^(!?)(U?)P(\d|T)$")


def _is_predicate(word: str) -> bool:
    return bool(_PREDICATE.match(word))


def predicate(word: str) -> str:
    match = _PREDICATE.match(word)
    assert match, word
    place = f"{'Q' if match[2] else 'P'}[{7 if match[3] == 'T' else match[3]}]"
    return f"(not {place})" if match[1] else place


def _set_predicate(word: str, value: str) -> str:
    match = _PREDICATE.match(word)
    assert match, word
    return "" if match[3] == "T" else f"{'Q' if match[2] else 'P'}[{match[3]}] = {value}"


def _place(word: str, step: int = 0) -> str:
    """The register as a target; register 256 takes what is not wanted."""
    match = _REGISTER.match(word)
    assert match, word
    file = "U" if match[1] else "R"
    if match[2] == "Z":
        return f"{file}[{'79' if file == 'U' else '259'}]"
    return f"{file}[{int(match[2]) + step}]"


def _value(word: str, pair: bool = False) -> str:
    """An expression of the bits of an operand, of 64 for a pair of registers."""
    mask = MASK | MASK << 32 if pair else MASK
    if word.startswith("-") and not re.match(r"^-[0-9.]", word):
        return f"(-{_value(word[1:], pair)} & {mask})"
    if word.startswith("~"):
        return f"(~{_value(word[1:], pair)} & {mask})"
    if word.startswith("|"):
        return f"abs(signed({_value(word.strip('|'))}))"
    if match := _REGISTER.match(word):
        if match[2] == "Z":
            return "0"
        low, high = _place(word), _place(word, 1)
        return f"({low} | {high} << 32)" if pair else low
    if match := re.match(r"^c\[0x0\]\[(0x[0-9a-f]+)\](\.\w+)?$", word):
        return f"m.constant({match[1]}, {8 if pair else 4})"
    if match := re.match(r"^c\[0x0\]\[(U?R\d+)\+?(0x[0-9a-f]+)?\]", word):
        return f"m.constant({_place(match[1])} + {match[2] or 0}, {8 if pair else 4})"
    if re.match(r"^-?0x[0-9a-f]+$", word):
        return str(int(word, 16) & mask)
    if word in ("SRZ", "PR"):
        return "0"
    try:
        return str(as_bits(float(word.replace("+INF", "inf").replace("-INF", "-inf").replace("QNAN", "nan"))))
    except ValueError:
        return "0"


def _address(word: str) -> str:
    """The address of a memory operand, without its descriptor."""
    inner = re.sub(r"^(g?desc\[[^\]]*\])", "", word).strip("[]")
    terms = []
    for term in re.findall(r"[+-]?[^+-]+", inner.replace(" ", "")):
        sign, term = ("-", term[1:]) if term[0] == "-" else ("", term.lstrip("+"))
        register = term.split(".")[0]
        wide = ".64" in term
        scale = re.search(r"\.X(\d+)", term)
        terms.append(f"{sign}({_value(register, wide)}){'*' + scale[1] if scale else ''}")
    return "(" + " + ".join(terms) + ")"


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
    return [f"t = {compared}; o = {other}", _set_predicate(first, f"t {join} o"),
            _set_predicate(second, f"(not t) {join} o")]  # fmt: skip


def _isetp(parts: list[str], words: list[str]) -> list[str]:
    first, second, a, b, other, *extended = words
    kind, joined = parts[1], next(part for part in parts if part in ("AND", "OR", "XOR"))
    a, b = _value(a), _value(b)
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
    magnitude = [f"abs(as_float({_value(x.strip('-|'))}))" if "|" in x else
                 f"{'-' if x.startswith('-') and _REGISTER.match(x[1:]) else ''}as_float("
                 f"{_value(x[1:] if x.startswith('-') and _REGISTER.match(x[1:]) else x)})"
                 for x in (a, b)]  # fmt: skip
    return _set_both(first, second, _compare(parts[1], *magnitude), joined, predicate(other))


def _term(word: str) -> str:
    """A summand: its negative as the complement and one, as the carry has it."""
    if word.startswith("-") and not re.match(r"^-0x", word):
        return f"((~{_value(word[1:])} & {MASK}) + 1)"
    return _value(word)


def _sum(parts: list[str], words: list[str]) -> list[str]:
    target, *rest = words
    carries = []
    while _is_predicate(rest[0]):
        carries.append(rest.pop(0))
    summands, inputs = rest[:3], rest[3:]
    terms = [_term(word) for word in summands]
    if "X" in parts:
        terms += [f"int({predicate(word)})" for word in inputs]
    lines = [f"t = {' + '.join(terms)}", f"{_place(target)} = t & {MASK}"]
    return lines + [_set_predicate(carry, f"t >> 32 > {i}") for i, carry in enumerate(carries)]


def _imad(parts: list[str], words: list[str]) -> list[str]:
    target, *rest = words
    carry_out = rest.pop(0) if _is_predicate(rest[0]) else None
    a, b, c = rest[:3]
    carry = f" + int({predicate(rest[3])})" if len(rest) > 3 and _is_predicate(rest[3]) else ""
    wide, high = "WIDE" in parts, "HI" in parts
    if wide or high:
        factors = [_value(a), _value(b)] if "U32" in parts else [f"signed({_value(a)})", f"signed({_value(b)})"]
        lines = [f"t = {factors[0]} * {factors[1]} + {_value(c, True)}{carry}"]
        if high:
            return [*lines, f"{_place(target)} = t >> 32 & {MASK}"]
        lines.append(f"{_place(target)} = t & {MASK}; {_place(target, 1)} = t >> 32 & {MASK}")
        return lines + ([_set_predicate(carry_out, "t >> 64 > 0")] if carry_out else [])
    lines = [f"t = {_value(a)} * {_value(b)} + {_value(c)}{carry}", f"{_place(target)} = t & {MASK}"]
    return lines + ([_set_predicate(carry_out, "t >> 32 > 0")] if carry_out else [])


def _lea(parts: list[str], words: list[str]) -> list[str]:
    target, *rest = words
    carry_out = rest.pop(0) if _is_predicate(rest[0]) else None
    carry = f" + int({predicate(rest.pop())})" if _is_predicate(rest[-1]) else ""
    shift = f"({_value(rest.pop())} & 63)"
    a, b = _value(rest[0]), _value(rest[1])
    if "HI" in parts:
        high = f"{_value(rest[2])} << 32" if len(rest) > 2 else "0"
        whole = f"signed({a})" if "SX32" in parts else f"({a} | {high})"
        shifted = f"({whole} << {shift} >> 32 & {MASK})"
    else:
        shifted = f"({a} << {shift} & {MASK})"
    lines = [f"t = {shifted} + {_term(rest[1]) if rest[1].startswith('-') else b}{carry}",
             f"{_place(target)} = t & {MASK}"]  # fmt: skip
    return lines + ([_set_predicate(carry_out, "t >> 32 > 0")] if carry_out else [])


def _shift(parts: list[str], words: list[str]) -> list[str]:
    target, low, by, high = words[:4]
    whole = f"({_value(high)} << 32 | {_value(low)})"
    if "S32" in parts or "S64" in parts:
        whole = f"signed64({whole})"
    if "U32" in parts and "HI" not in parts and "L" in parts:
        whole = _value(low)
    shifted = f"{whole} {'<<' if 'L' in parts else '>>'} ({_value(by)} & 63)"
    return [f"{_place(target)} = ({shifted}){' >> 32' if 'HI' in parts else ''} & {MASK}"]


def _lop3(parts: list[str], words: list[str]) -> list[str]:
    predicate = words.pop(0) if _is_predicate(words[0]) else None
    target, a, b, c, table, *_ = words
    lines = [f"t = lut3({_value(a)}, {_value(b)}, {_value(c)}, {int(table, 16)})", f"{_place(target)} = t"]
    return lines + ([_set_predicate(predicate, "t != 0")] if predicate else [])


def _plop3(parts: list[str], words: list[str]) -> list[str]:
    first, second, a, b, c, table, other = words
    index = f"(int({predicate(a)}) << 2 | int({predicate(b)}) << 1 | int({predicate(c)}))"
    return [f"t = {index}", _set_predicate(first, f"bool({int(table, 16)} >> t & 1)"),
            _set_predicate(second, f"bool({int(other, 16)} >> t & 1)")]  # fmt: skip


def _minmax(parts: list[str], words: list[str]) -> list[str]:
    target, *values, which = words
    added = parts[0].startswith("VIADD")
    numbers = [_value(word) for word in values]
    if added:
        numbers = [f"({numbers[0]} + {numbers[1]} & {MASK})", numbers[2]]
    if "U32" not in parts:
        numbers = [f"signed({number})" for number in numbers]
    joined = ", ".join(numbers)
    return [f"{_place(target)} = (min({joined}) if {predicate(which)} else max({joined})) & {MASK}"]


def _move(parts: list[str], words: list[str]) -> list[str]:
    return [f"{_place(words[0])} = {_value(words[1])}"]


def _load_constant(parts: list[str], words: list[str]) -> list[str]:
    size = next((_BYTES[part] for part in parts if part in _BYTES), 4)
    if size == 8:
        return [f"t = {_value(words[1], True)}",
                f"{_place(words[0])} = t & {MASK}; {_place(words[0], 1)} = t >> 32"]  # fmt: skip
    return [f"{_place(words[0])} = {_value(words[1])} & {(1 << 8 * size) - 1}"]


def _load(parts: list[str], words: list[str]) -> list[str]:
    size = next((_BYTES[part] for part in parts if part in _BYTES), 4)
    places = [word for word in words if not _is_predicate(word)]
    address = _address(places[1])
    source = {"LDS": f"m.load_words(m.shared, {address}, {size})", "LDL": f"m.load_words(m.local, {address}, {size})"}
    lines = [f"t = {source.get(parts[0], f'm.load({address}, {size})')}"]
    for i in range(max(1, size // 4)):
        lines.append(f"{_place(places[0], i)} = t >> {32 * i} & {MASK}")
    return lines


def _moved(parts: list[str], words: list[str]) -> list[str]:
    """A store, or an asynchronous copy, of global memory: its bytes, where its last operand says that it happens."""
    size = next((_BYTES[part] for part in parts if part in _BYTES), 4)
    condition = f"if {predicate(words[-1])}: " if _is_predicate(words[-1]) else ""
    return [f"{condition}m.bytes += {size}"]


def _store(parts: list[str], words: list[str]) -> list[str]:
    size = next((_BYTES[part] for part in parts if part in _BYTES), 4)
    memory = "m.shared" if parts[0] == "STS" else "m.local"
    value = " | ".join(f"{_place(words[1], i)} << {32 * i}" for i in range(max(1, size // 4)))
    if words[1].endswith("RZ"):
        value = "0"
    return [f"m.store_words({memory}, {_address(words[0])}, {value}, {size})"]


def _vote(parts: list[str], words: list[str]) -> list[str]:
    vote = predicate(words[-1])
    lines = [f"t = {vote}"]
    for word in words[:-1]:
        lines.append(_set_predicate(word, "t") if _is_predicate(word) else f"{_place(word)} = {MASK} if t else 0")
    return lines


def _shuffle(parts: list[str], words: list[str]) -> list[str]:
    predicate, target, value = words[:3]
    return [f"{_place(target)} = {_value(value)}", _set_predicate(predicate, "True")]


def _sign_extension(parts: list[str], words: list[str]) -> list[str]:
    bits = f"({_value(words[2])} & 31)"
    value = f"({_value(words[1])} & (1 << {bits}) - 1)"
    if "U32" not in parts:
        value = f"(({value} ^ 1 << {bits} - 1) - (1 << {bits} - 1))"
    return [f"{_place(words[0])} = ({value} & {MASK}) if {bits} else 0"]


def _predicates_to_register(parts: list[str], words: list[str]) -> list[str]:
    mask = int(words[3], 16)
    bits = " | ".join(f"int(P[{i}]) << {i}" for i in range(7) if mask >> i & 1) or "0"
    return [f"{_place(words[0])} = {_value(words[2])} & {~mask & MASK} | {bits}"]


def _register_to_predicates(parts: list[str], words: list[str]) -> list[str]:
    mask = int(words[2], 16)
    return [f"P[{i}] = bool({_value(words[1])} >> {i} & 1)" for i in range(7) if mask >> i & 1]


def _to_float(parts: list[str], words: list[str]) -> list[str]:
    value = _value(words[1])
    value = value if "U32" in parts else f"signed({value})"
    return [f"{_place(words[0])} = as_bits(float({value}))"]


def _atomic(parts: list[str], words: list[str]) -> list[str]:
    places = [word for word in words if not _is_predicate(word)]
    lines = [f"t = m.atomic({_address(places[1])})", f"{_place(places[0])} = t & {MASK}"]
    return [*lines, f"{_place(places[0], 1)} = t >> 32 & {MASK}"] if "64" in parts else lines


def _clear_pair(parts: list[str], words: list[str]) -> list[str]:
    return [f"{_place(words[0])} = 0"] + ([] if "32" in parts else [f"{_place(words[0], 1)} = 0"])


def _select(parts: list[str], words: list[str]) -> list[str]:
    return [f"{_place(words[0])} = {_value(words[1])} if {predicate(words[3])} else {_value(words[2])}"]


def _half_constant(words: list[str]) -> list[str]:
    """HFMA2 of zeros is how a constant is made."""
    high, low = (int.from_bytes(struct.pack("<e", float(word)), "little") for word in words[3:5])
    return [f"{_place(words[0])} = {high << 16 | low}"]


_EFFECTS: dict[str, Callable[[list[str], list[str]], list[str]]] = {
    "MOV": _move, "UMOV": _move, "R2UR": _move, "S2R": lambda p, w: [f"{_place(w[0])} = m.special({w[1]!r})"],
    "S2UR": lambda p, w: [f"{_place(w[0])} = m.special({w[1]!r})"], "CS2R": _clear_pair,
    "LDC": _load_constant, "ULDC": _load_constant, "LDCU": _load_constant,
    "IADD3": _sum, "UIADD3": _sum,
    "VIADD": lambda p, w: [f"{_place(w[0])} = ({_value(w[1])} + {_value(w[2])}) & {MASK}"],
    "IMAD": _imad, "UIMAD": _imad, "LEA": _lea, "ULEA": _lea, "SHF": _shift, "USHF": _shift,
    "LOP3": _lop3, "ULOP3": _lop3, "PLOP3": _plop3, "UPLOP3": _plop3, "ISETP": _isetp, "UISETP": _isetp,
    "FSETP": _fsetp, "SEL": _select, "USEL": _select, "FSEL": _select, "VIMNMX": _minmax, "IMNMX": _minmax,
    "UIMNMX": _minmax, "VIMNMX3": _minmax, "VIADDMNMX": _minmax, "SGXT": _sign_extension, "USGXT": _sign_extension,
    "PRMT": lambda p, w: [f"{_place(w[0])} = permute({_value(w[1])}, {_value(w[2])}, {_value(w[3])})"],
    "UPRMT": lambda p, w: [f"{_place(w[0])} = permute({_value(w[1])}, {_value(w[2])}, {_value(w[3])})"],
    "IABS": lambda p, w: [f"{_place(w[0])} = abs(signed({_value(w[1])}))"],
    "FLO": lambda p, w: [f"{_place(w[0])} = leading_one({_value(w[1])})"],
    "UFLO": lambda p, w: [f"{_place(w[0])} = leading_one({_value(w[1])})"],
    "POPC": lambda p, w: [f"{_place(w[0])} = bin({_value(w[1])}).count('1')"],
    "UPOPC": lambda p, w: [f"{_place(w[0])} = bin({_value(w[1])}).count('1')"],
    "BREV": lambda p, w: [f"{_place(w[0])} = int(f'{{{_value(w[1])}:032b}}'[::-1], 2)"],
    "P2R": _predicates_to_register, "R2P": _register_to_predicates, "I2F": _to_float, "I2FP": _to_float,
    "F2I": lambda p, w: [f"{_place(w[0])} = to_integer({_value(w[1])}, {'U32' not in p})"],
    "VOTE": _vote, "VOTEU": _vote, "SHFL": _shuffle, "REDUX": _move, "CREDUX": _move,
    "LDG": _load, "LD": _load, "LDS": _load, "LDL": _load, "STS": _store, "STL": _store,
    "STG": _moved, "ST": _moved, "LDGSTS": _moved, "ATOMG": _atomic, "ATOM": _atomic, "ATOMS": _atomic,
    "ELECT": lambda p, w: [_set_predicate(w[0], "True")],
    "SYNCS": lambda p, w: [_set_predicate(w[0], "True")] if _is_predicate(w[0]) else [],
}  # fmt: skip


def statements(instruction: Instruction) -> list[str]:
    """What an instruction does to registers, predicates and memory."""
    parts, words = instruction.name.split("."), _split(instruction.operands)
    base = parts[0]
    if base == "MUFU" and "RCP" in parts:
        return [f"{_place(words[0])} = reciprocal({_value(words[1])})"]
    if base == "HFMA2" and words[1:3] in (["-RZ", "RZ"], ["RZ", "RZ"]) and len(words) == 5:
        return _half_constant(words)
    if base in _EFFECTS:
        return [line for line in _EFFECTS[base](parts, words) if line]
    if base in _FLOATS:
        return (
            [f"{_place(words[0])} = 0"] if words and _REGISTER.match(words[0]) and base not in ("HMMA", "HGMMA") else []
        )
    if base in _NOTHING:
        return []
    raise NotImplementedError(f"{instruction.name} {instruction.operands}")


def ends(instruction: Instruction) -> bool:
    return instruction.name.split(".")[0] in ("BRA", "EXIT", "CALL", "RET", "JMP", "BRX", "JMX", "KILL")


def jump(instruction: Instruction) -> str:
    base, words = instruction.name.split(".")[0], _split(instruction.operands)
    if base == "RET":
        return f"return {_place(words[0].split()[0])}"
    match = re.search(r"0x([0-9a-f]+)", instruction.operands)
    if base in ("EXIT", "KILL"):
        text = "return None"
    elif base in ("BRA", "CALL", "JMP") and match is not None and "c[" not in instruction.operands:
        text = f"return {int(match[1], 16)}"
    else:
        raise NotImplementedError(f"{instruction.name} {instruction.operands}")
    conditions = [predicate(word) for word in words if _is_predicate(word)]
    return f"if {' and '.join(conditions)}: {text}" if conditions else text
