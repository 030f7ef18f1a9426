"""The results on one screen, failures first. Only the last lines of a command may be visible."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gpu.results import Record, Try

MOST = 11_000  # characters
_LINE = 220
_OURS = "interformer"


def printed(tries: Mapping[str, Try], damaged: int = 0) -> str:
    """All of it, cut off at the end where it is too long."""
    records = [record for one in tries.values() for record in one.records]
    parts = [
        header(records),
        _titled("FAILED", failures(tries, records, damaged)),
        _titled("NOT DONE", not_done(tries)),
        _titled("parity: backend, op, dtype; compared, breaches, largest share of the budget", parity(records)),
        _titled("checks: backend, kind; right, wrong, not asked", checks(records)),
        _titled("ceilings", ceilings(records)),
        _titled("bench: job, pass, by; eager, graph; fastest right peer, times as fast as it", bench(records)),
        _titled("first calls: backend, op; first, second", first_calls(records)),
        _titled("steps, seconds", steps(tries)),
    ]
    text = "\n".join(filter(None, parts))
    return text if len(text) <= MOST else f"{text[:MOST]}\n... cut off; the whole is in results.jsonl"


def _titled(title: str, lines: Iterable[str]) -> str:
    shown = [line if len(line) <= _LINE else f"{line[:_LINE]} ..." for line in lines]
    return "\n".join([f"== {title}", *shown]) if shown else ""


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """Those of one kind."""
    return [record for record in records if record["kind"] == kind]


def header(records: Sequence[Record]) -> str:
    """The machine and the versions of the report."""
    machine = next(iter(of_kind(records, "machine")), {})
    report = next(iter(reversed(of_kind(records, "report"))), {})
    versions = [f"{name} {machine.get(name) or 'unknown'}" for name in ("torch", "triton", "cuda", "numpy", "python")]
    lines = [
        f"{machine.get('gpu') or 'GPU unknown'}: {', '.join(versions)}; commit {report.get('commit') or 'unknown'}"
    ]
    missing = [name for name, path in (report.get("tools") or {}).items() if path is None]
    lines += [f"not installed: {', '.join(missing)}"] if missing else []
    kit = of_kind(records, "kit")
    return "\n".join([*lines, *(kit[-1]["said"] if kit else ())])


# ---------------------------------------------------------------- what failed


def failures(tries: Mapping[str, Try], records: Sequence[Record], damaged: int = 0) -> Iterator[str]:
    """Wrong numbers, then steps that did not end well; the first ones of each kind."""
    bad = [f"{one.step}: {one.status}{_last_of(one)}" for one in tries.values() if one.begun and not one.ok]
    bad += [f"{one.step}: left {one.left_behind} processes behind" for one in tries.values() if one.left_behind]
    bad += [f"{damaged} lines of the results are damaged and left out"] if damaged else []
    for lines, most in ((list(_breaches(records)), 10), (list(_wrong(records)), 10), (bad, 20)):
        yield from lines[:most]
        if lines[most:]:
            yield f"... and {len(lines) - most} more of this kind"


def not_done(tries: Mapping[str, Try]) -> Iterator[str]:
    """Steps that were not begun: a line for each reason."""
    found: dict[str, list[str]] = {}
    for one in tries.values():
        if not one.begun:
            found.setdefault(one.status, []).append(one.step)
    for reason, names in found.items():
        yield f"{reason}: {', '.join(names)}"


def _last_of(one: Try) -> str:
    return f" | {one.last[-1]}" if one.last and one.status.startswith("failed") else ""


def _breaches(records: Sequence[Record]) -> Iterator[str]:
    wrong = [one for one in of_kind(records, "parity") if not one["ok"]]
    for one in sorted(wrong, key=lambda one: -(one["share"] or float("inf"))):
        share = "" if one["share"] is None else f" {one['share']:.3g} times the budget"
        where = " ".join(str(one[name]) for name in ("backend", "op", "dtype", "case", "quantity"))
        yield f"PARITY {where}:{share} {one['problem'] or ''}".rstrip()


def _wrong(records: Sequence[Record]) -> Iterator[str]:
    for one in records:
        about = " ".join(str(one[name]) for name in ("backend", "what", "dtype", "case") if one.get(name))
        if one["kind"] in ("check", "smoke", "determinism") and one.get("ok") is False:
            yield f"{one['step']} {about}: {one.get('problem') or one.get('differing')}"
        elif one["kind"] == "failed":
            yield f"{one['step']}: {one.get('problem')}"
    for one in _latest(of_kind(records, "bench")):
        if one["runner"] == _OURS and one["problem"]:
            yield f"{one['step']} {one['backend']} {one['pass']}: {one['problem']}"


# ---------------------------------------------------------------- what was found


def parity(records: Sequence[Record]) -> Iterator[str]:
    """A line for each backend and op: by dtype what was compared and what was wrong."""
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for one in of_kind(records, "parity"):
        groups.setdefault((one["backend"], one["op"]), {}).setdefault(one["dtype"], []).append(one)
    for (backend, op), dtypes in groups.items():
        told = []
        for dtype, compared in dtypes.items():
            shares = [one["share"] for one in compared if one["share"] is not None]
            wrong = sum(not one["ok"] for one in compared)
            told.append(f"{dtype} {len(compared)}, {wrong}, {max(shares, default=0.0):.2f}")
        yield f"{backend:9} {op:22} {'; '.join(told)}"


def checks(records: Sequence[Record]) -> Iterator[str]:
    """A line for each backend and kind of check."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for one in records:
        if one["kind"] in ("check", "smoke", "determinism"):
            kind = str(one["step"]).partition(".")[0] if one["kind"] == "check" else one["kind"]
            groups.setdefault((str(one.get("backend")), kind), []).append(one["ok"])
    for (backend, kind), oks in sorted(groups.items()):
        yield f"{backend:9} {kind:22} {oks.count(True)}, {oks.count(False)}, {oks.count(None)}"


def ceilings(records: Sequence[Record]) -> Iterator[str]:
    """The rates of products and copies."""
    for one in {one["dtype"]: one for one in of_kind(records, "ceiling")}.values():
        yield f"{one['dtype']:9} {one['gemm'] / 1e12:.4g} TFLOP/s, {one['copy'] / 1e9:.4g} GB/s"


def bench(records: Sequence[Record]) -> Iterator[str]:
    """A line for each job, pass and backend of this package; by graphs, where both have one."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for one in _latest(of_kind(records, "bench")):
        groups.setdefault((one["step"], one["pass"]), []).append(one)
    for (step, direction), group in groups.items():
        for ours in (one for one in group if one["runner"] == _OURS and one["median"] is not None):
            peers = [_faster(ours, group, of) for of in ("median", "graph")]
            times = f"{_time(ours['median'])}, {_time(ours['graph'])}"
            yield f"{step:24} {direction:16} {ours['backend']:7} {times}; {'; '.join(filter(None, peers)) or 'no peer'}"


def _faster(ours: Record, group: Sequence[Record], of: str) -> str | None:
    """The fastest right peer, and how many times as fast as it ours is."""
    right = [one for one in group if one["runner"] != _OURS and one["problem"] is None and one[of] is not None]
    if not right or not ours[of] or ours["problem"] is not None:
        return None
    peer = min(right, key=lambda one: float(one[of]))
    wanted = f" (wanted {ours['wanted']:g})" if ours["wanted"] is not None and of == "median" else ""
    name = "eager" if of == "median" else "graph"
    return f"{name} {peer['runner']} {_time(peer[of])} {float(peer[of]) / float(ours[of]):.2f}x{wanted}"


def _latest(records: Iterable[Record]) -> list[Record]:
    """A later record of the same runner takes an earlier one's place."""
    return list({(one["step"], one["pass"], one["runner"], one["backend"]): one for one in records}.values())


def first_calls(records: Sequence[Record]) -> Iterator[str]:
    """Compiling included."""
    for one in of_kind(records, "first"):
        yield f"{one['backend']:9} {one['op']:22} {_time(one['first'])}, {_time(one['second'])}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def steps(tries: Mapping[str, Try]) -> Iterator[str]:
    """Those that ended well, in a paragraph."""
    well = [f"{one.step} {one.seconds:.0f}" for one in tries.values() if one.ok and one.step != "report"]
    for start in range(0, len(well), 6):
        yield "; ".join(well[start : start + 6])


def now() -> str:
    """In UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
