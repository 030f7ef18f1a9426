"""The records of a GPU's bench and checks as Markdown tables.

A later record of the same job, runner and pass replaces an earlier one. Results that are wrong, or that were not timed,
are listed and enter no ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from interformer_bench.peers import OURS
from interformer_bench.report import rows

Record = Mapping[str, Any]
RATIOS = (
    *("job", "shape", "dtype", "pass", "by", "eager", "best peer", "ratio", "graph", "best peer's graph", "ratio"),
    *("of limit", "wanted"),
)
RUNNERS = ("job", "pass", "runner", "eager", "spread", "graph", "peak", "TFLOP/s", "GB/s")
CEILINGS = ("dtype", "products", "spread", "copies", "spread")
CHECKS = ("check", "by", "asked", "right", "wrong", "not asked")


def tables(records: Iterable[Record]) -> str:
    """Ceilings, ratios, every runner's times, untimed runners, checks and failures, as far as there are records.

    Records of other kinds are skipped; those without the fields of their kind are counted.
    """
    of_kind = [record for record in records if not isinstance(record, Mapping) or record.get("kind") in _KINDS]
    valid = [record for record in of_kind if _is_valid(record)]
    bench = _latest(record for record in valid if record["kind"] == "bench")
    ceilings = {record["dtype"]: record for record in valid if record["kind"] == "ceiling"}
    checks = [record for record in valid if record["kind"] == "check"]
    parts = []
    if any(record.get("tiny") or record.get("device") == "cpu" for record in valid):
        parts.append("**A rehearsal: some of this ran on tiny sizes or without a GPU, and its times say nothing.**")
    if ceilings:
        parts += ["## Ceilings", rows(CEILINGS, [_ceiling(record) for record in ceilings.values()])]
    lines = ratios(bench, ceilings)
    if lines:
        parts += ["## Against the fastest right peer", _HOW, rows(RATIOS, lines)]
    timed = [record for record in bench if record["median"] is not None]
    if timed:
        parts += ["## All runners", rows(RUNNERS, [_runner(record) for record in timed])]
    if checks:
        parts += ["## Checks", rows(CHECKS, _by_check(checks))]
    invalid = len(of_kind) - len(valid)
    wrong = [*([f"{invalid} records that make no sense"] if invalid else []), *_wrong(checks, valid)]
    for title, items in (("Wrong", wrong), ("Not timed", _not_timed(bench))):
        if items:
            parts += [f"## {title}", "\n".join(f"- {item}" for item in items)]
    return "\n\n".join(parts) + "\n" if parts else ""


_HOW = (
    "Ratios are the peer's time over ours: above 1, ours is faster. Calls alternate between several sets of inputs, so "
    "the cache holds less of them. The limit is the nearer one of products and copies; its share is that of the graph "
    "where there is one, and the wanted ratio is compared with that of graphs where there is one."
)


def _is_valid(record: Record) -> bool:
    """Whether a record has the fields that the tables read."""
    try:
        _KINDS[record["kind"]](record)
        return all(isinstance(record[name], str) for name in ("step", *_NAME_FIELDS.get(record["kind"], ())))
    except (AttributeError, ArithmeticError, KeyError, LookupError, TypeError, ValueError):
        return False


def _read_bench(record: Record) -> None:
    _ratio_row(record, [record], None)
    _verdict(record, 1.0)
    if record["median"] is not None:
        _runner(record)


def _read_failure(record: Record) -> str:
    return f"{record['step']}: {record['problem']}"


def _latest(records: Iterable[Record]) -> list[Record]:
    by_key: dict[tuple[Any, ...], Record] = {}
    for record in records:
        key = record["step"], record["pass"], record["runner"], record["backend"]
        by_key[key] = record  # the order is that of the keys' first records
    return list(by_key.values())


# ---------------------------------------------------------------- ratios


def ratios(bench: Sequence[Record], ceilings: Mapping[str, Record]) -> list[tuple[str, ...]]:
    """A row for each job, pass and backend of this package that is right."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in bench:
        groups.setdefault((record["step"], record["pass"]), []).append(record)
    table_rows = []
    for group in groups.values():
        for ours in group:
            if ours["runner"] == OURS and ours["median"] is not None and ours["problem"] is None:
                table_rows.append(_ratio_row(ours, group, ceilings.get(ours["dtype"])))
    return table_rows


def best_peer(group: Sequence[Record], time: str) -> Record | None:
    """The right peer with the shortest time; `time` names the field: "median" (eager) or "graph"."""
    peers = [record for record in group if record["runner"] != OURS and record["problem"] is None]
    timed = [record for record in peers if record[time] is not None]
    return min(timed, key=lambda record: float(record[time]), default=None)


def ratio(ours: Record, group: Sequence[Record], time: str) -> float | None:
    """The best peer's time over ours; None where either has none."""
    peer = best_peer(group, time)
    if not ours[time] or peer is None:
        return None
    return float(peer[time]) / float(ours[time])


def of_limit(record: Record, ceiling: Record | None) -> tuple[float, str] | None:
    """The share of the machine's nearer limit that was reached, and the name of that limit."""
    seconds = record["graph"] or record["median"]
    if ceiling is None or not seconds or not record["flops"]:
        return None
    limits = (record["flops"] / ceiling["gemm"], "GEMM"), (record["bytes"] / ceiling["copy"], "copy")
    limit, name = max(limits)
    return limit / seconds, name


def _ratio_row(ours: Record, group: Sequence[Record], ceiling: Record | None) -> tuple[str, ...]:
    eager, graph = (ratio(ours, group, time) for time in ("median", "graph"))
    limit = of_limit(ours, ceiling)
    mean = ours["tokens"] / max(ours["rows"], 1)
    return (
        ours["step"],
        f"{ours['op']}, {ours['rows']} x {mean:.0f} ({ours['longest']}), {ours['sizes']}",
        ours["dtype"],
        ours["pass"],
        ours["backend"],
        _format_time(ours["median"]),
        _peer(group, "median"),
        _format_ratio(eager),
        _format_time(ours["graph"]),
        _peer(group, "graph"),
        _format_ratio(graph),
        f"{limit[0]:.0%} {limit[1]}" if limit else "-",
        _verdict(ours, eager if graph is None else graph),
    )


def _verdict(ours: Record, reached: float | None) -> str:
    target = ours["wanted"]
    if target is None or reached is None:
        return "-"
    verdict = "pass" if reached >= target else "MISS"
    return f">= {target:g}x {'(rehearsal)' if ours['tiny'] else verdict}"


def _peer(group: Sequence[Record], time: str) -> str:
    peer = best_peer(group, time)
    return f"{_format_time(peer[time])} ({peer['runner']})" if peer else "-"


# ---------------------------------------------------------------- the other tables


def _ceiling(record: Record) -> tuple[str, ...]:
    return (
        record["dtype"],
        f"{record['gemm'] / 1e12:.3g} TFLOP/s ({record['size']}^3)",
        f"{record['gemm_spread']:.0%}",
        f"{record['copy'] / 1e9:.4g} GB/s ({record['copied'] / 2**30:.3g} GiB)",
        f"{record['copy_spread']:.0%}",
    )


def _runner(record: Record) -> tuple[str, ...]:
    seconds, graph = record["graph"] or record["median"], record["graph"]
    name = f"{OURS} ({record['backend']})" if record["runner"] == OURS else record["runner"]
    name += ", WRONG" if record["problem"] is not None else ""
    return (
        record["step"],
        record["pass"],
        name,
        _format_time(record["median"]),
        f"{record['spread']:.0%} of {record['samples']}",
        _format_time(graph) if graph is not None else str(record["graph_problem"] or "-").replace("|", "/"),
        f"{record['peak'] / 2**20:.1f} MiB" if record["peak"] is not None else "-",
        f"{record['flops'] / seconds / 1e12:.3g}" if seconds else "-",
        f"{record['bytes'] / seconds / 1e9:.0f}" if seconds else "-",
    )


def _by_check(checks: Sequence[Record]) -> list[tuple[str, ...]]:
    """A row for each check and backend, with the number of findings of each kind."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in checks:
        groups.setdefault((record["step"], record["backend"]), []).append(record)

    def count(group: Sequence[Record], holds: Callable[[Any], bool]) -> str:
        return str(sum(holds(record["ok"]) for record in group))

    return [
        (
            *key,
            str(len(group)),
            count(group, lambda ok: ok is True),
            count(group, lambda ok: ok is False),
            count(group, lambda ok: ok is None),
        )
        for key, group in groups.items()
    ]


def _wrong(checks: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """Wrong results of this package, and jobs that ended early."""
    lines = [_read_check(record) for record in checks if record["ok"] is False]
    lines += [_read_failure(record) for record in records if record["kind"] == "failed"]
    for record in _latest(record for record in records if record["kind"] == "bench"):
        if record["runner"] == OURS and record["problem"] is not None:
            lines.append(f"{record['step']} ({record['backend']}), {record['pass']}: {record['problem']}")
    return lines


def _read_check(record: Record) -> str:
    row = f", row {record['row']}" if record["row"] is not None else ""
    subject = f"{record['step']} ({record['backend']}), {record['what']}, {record['dtype']}{row}"
    return f"{subject}: {record['problem']}"


def _not_timed(bench: Sequence[Record]) -> list[str]:
    """Peers without a time: a line for each reason, with its jobs, and their pass where it is only one."""
    by_reason: dict[tuple[str, str], dict[str, list[str]]] = {}
    for record in bench:
        if record["runner"] != OURS and record["problem"] is not None:
            jobs = by_reason.setdefault((record["runner"], str(record["problem"])), {})
            jobs.setdefault(record["step"], []).append(record["pass"])
    lines = []
    for (runner, problem), jobs in by_reason.items():
        places = (f"{job}, {passes[0]}" if len(passes) == 1 else job for job, passes in jobs.items())
        lines.append(f"{runner}: {problem} ({'; '.join(places)})")
    return lines


def _format_time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _format_ratio(value: float | None) -> str:
    return f"{value:.2f}x" if value is not None else "-"


# Functions that read every field that the tables need of a record, by kind; and the fields that must be strings.
_KINDS: Mapping[str, Callable[[Record], object]] = {
    "ceiling": _ceiling,
    "bench": _read_bench,
    "check": lambda record: (_read_check(record), record["ok"]),
    "failed": _read_failure,
}
_NAME_FIELDS = {
    "ceiling": ("dtype",),
    "bench": ("pass", "runner", "backend", "dtype"),
    "check": ("backend", "what", "dtype"),
}
