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
    """The whole table, cut off at the end where it is too long."""
    records = [record for attempt in tries.values() for record in attempt.records]
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
    """The records of one kind."""
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


# ---------------------------------------------------------------- failures


def failures(tries: Mapping[str, Try], records: Sequence[Record], damaged: int = 0) -> Iterator[str]:
    """Wrong numbers, then steps that did not end well; the first ones of each kind."""
    bad = [
        f"{attempt.step}: {attempt.status}{_last_of(attempt)}"
        for attempt in tries.values()
        if attempt.begun and not attempt.ok
    ]
    bad += [
        f"{attempt.step}: left {attempt.left_behind} processes behind"
        for attempt in tries.values()
        if attempt.left_behind
    ]
    bad += [f"{damaged} lines of the results are damaged and left out"] if damaged else []
    for lines, limit in ((list(_breaches(records)), 10), (list(_wrong(records)), 10), (bad, 20)):
        yield from lines[:limit]
        if lines[limit:]:
            yield f"... and {len(lines) - limit} more of this kind"


def not_done(tries: Mapping[str, Try]) -> Iterator[str]:
    """Steps that were not begun: a line for each reason."""
    steps_of: dict[str, list[str]] = {}
    for attempt in tries.values():
        if not attempt.begun:
            steps_of.setdefault(attempt.status, []).append(attempt.step)
    for reason, names in steps_of.items():
        yield f"{reason}: {', '.join(names)}"


def _last_of(attempt: Try) -> str:
    return f" | {attempt.last[-1]}" if attempt.last and attempt.status.startswith("failed") else ""


def _breaches(records: Sequence[Record]) -> Iterator[str]:
    wrong = [record for record in of_kind(records, "parity") if not record["ok"]]
    for record in sorted(wrong, key=lambda record: -(record["share"] or float("inf"))):
        share = "" if record["share"] is None else f" {record['share']:.3g} times the budget"
        subject = " ".join(str(record[name]) for name in ("backend", "op", "dtype", "case", "quantity"))
        yield f"PARITY {subject}:{share} {record['problem'] or ''}".rstrip()


def _wrong(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        subject = " ".join(str(record[name]) for name in ("backend", "what", "dtype", "case") if record.get(name))
        if record["kind"] in ("check", "smoke", "determinism") and record.get("ok") is False:
            yield f"{record['step']} {subject}: {record.get('problem') or record.get('differing')}"
        elif record["kind"] == "failed":
            yield f"{record['step']}: {record.get('problem')}"
    for record in _latest(of_kind(records, "bench")):
        if record["runner"] == _OURS and record["problem"]:
            yield f"{record['step']} {record['backend']} {record['pass']}: {record['problem']}"


# ---------------------------------------------------------------- results


def parity(records: Sequence[Record]) -> Iterator[str]:
    """A line for each backend and op: by dtype the numbers of comparisons and of breaches, and the largest share."""
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in of_kind(records, "parity"):
        groups.setdefault((record["backend"], record["op"]), {}).setdefault(record["dtype"], []).append(record)
    for (backend, op), dtypes in groups.items():
        columns = []
        for dtype, compared in dtypes.items():
            shares = [record["share"] for record in compared if record["share"] is not None]
            wrong = sum(not record["ok"] for record in compared)
            columns.append(f"{dtype} {len(compared)}, {wrong}, {max(shares, default=0.0):.2f}")
        yield f"{backend:9} {op:22} {'; '.join(columns)}"


def checks(records: Sequence[Record]) -> Iterator[str]:
    """A line for each backend and kind of check."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for record in records:
        if record["kind"] in ("check", "smoke", "determinism"):
            kind = str(record["step"]).partition(".")[0] if record["kind"] == "check" else record["kind"]
            groups.setdefault((str(record.get("backend")), kind), []).append(record["ok"])
    for (backend, kind), oks in sorted(groups.items()):
        yield f"{backend:9} {kind:22} {oks.count(True)}, {oks.count(False)}, {oks.count(None)}"


def ceilings(records: Sequence[Record]) -> Iterator[str]:
    """The rates of products and copies."""
    for record in {record["dtype"]: record for record in of_kind(records, "ceiling")}.values():
        yield f"{record['dtype']:9} {record['gemm'] / 1e12:.4g} TFLOP/s, {record['copy'] / 1e9:.4g} GB/s"


def bench(records: Sequence[Record]) -> Iterator[str]:
    """A line for each job, pass and backend of this package; by graphs, where both have one."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in _latest(of_kind(records, "bench")):
        groups.setdefault((record["step"], record["pass"]), []).append(record)
    for (step, direction), group in groups.items():
        for ours in (record for record in group if record["runner"] == _OURS and record["median"] is not None):
            peers = [_faster(ours, group, statistic) for statistic in ("median", "graph")]
            times = f"{_time(ours['median'])}, {_time(ours['graph'])}"
            yield f"{step:24} {direction:16} {ours['backend']:7} {times}; {'; '.join(filter(None, peers)) or 'no peer'}"


def _faster(ours: Record, group: Sequence[Record], statistic: str) -> str | None:
    """The fastest right peer, and how many times as fast as it ours is."""
    right = [
        record
        for record in group
        if record["runner"] != _OURS and record["problem"] is None and record[statistic] is not None
    ]
    if not right or not ours[statistic] or ours["problem"] is not None:
        return None
    peer = min(right, key=lambda record: float(record[statistic]))
    target = f" (wanted {ours['wanted']:g})" if ours["wanted"] is not None and statistic == "median" else ""
    name = "eager" if statistic == "median" else "graph"
    speed = float(peer[statistic]) / float(ours[statistic])
    return f"{name} {peer['runner']} {_time(peer[statistic])} {speed:.2f}x{target}"


def _latest(records: Iterable[Record]) -> list[Record]:
    """A later record of the same runner takes an earlier one's place."""
    return list(
        {(record["step"], record["pass"], record["runner"], record["backend"]): record for record in records}.values()
    )


def first_calls(records: Sequence[Record]) -> Iterator[str]:
    """Times of first calls, compiling included, and of second ones."""
    for record in of_kind(records, "first"):
        yield f"{record['backend']:9} {record['op']:22} {_time(record['first'])}, {_time(record['second'])}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def steps(tries: Mapping[str, Try]) -> Iterator[str]:
    """Steps that ended well, in a paragraph."""
    successful = [
        f"{attempt.step} {attempt.seconds:.0f}" for attempt in tries.values() if attempt.ok and attempt.step != "report"
    ]
    for start in range(0, len(successful), 6):
        yield "; ".join(successful[start : start + 6])


def now() -> str:
    """The time in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
