"""The records of a GPU's bench and checks as Markdown: `tables`.

A later record of the same job, runner and pass takes an earlier one's place. What was wrong, or was not timed, is told
and is in no ratio.
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
    """Ceilings, ratios, every runner's times, what was not timed, checks, and what failed, as far as there is any.

    Records of other kinds are passed over; those that are not what their kind says are counted.
    """
    given = [one for one in records if not isinstance(one, Mapping) or one.get("kind") in _KINDS]
    known = [one for one in given if _sound(one)]
    bench = _latest(one for one in known if one.get("kind") == "bench")
    ceilings = {one["dtype"]: one for one in known if one.get("kind") == "ceiling"}
    checks = [one for one in known if one.get("kind") == "check"]
    parts = []
    if any(one.get("tiny") or one.get("device") == "cpu" for one in known):
        parts.append("**A rehearsal: some of this ran on tiny sizes or without a GPU, and its times say nothing.**")
    if ceilings:
        parts += ["## Ceilings", rows(CEILINGS, [_ceiling(one) for one in ceilings.values()])]
    lines = ratios(bench, ceilings)
    if lines:
        parts += ["## Against the fastest right peer", _HOW, rows(RATIOS, lines)]
    timed = [one for one in bench if one["median"] is not None]
    if timed:
        parts += ["## All runners", rows(RUNNERS, [_runner(one) for one in timed])]
    if checks:
        parts += ["## Checks", rows(CHECKS, _by_check(checks))]
    odd = [f"{len(given) - len(known)} records that make no sense"] if len(known) < len(given) else []
    for title, found in (("Wrong", odd + _wrong(checks, known)), ("Not timed", _not_timed(bench))):
        if found:
            parts += [f"## {title}", "\n".join(f"- {line}" for line in found)]
    return "\n\n".join(parts) + "\n" if parts else ""


_HOW = (
    "Ratios are the peer's time over ours: above 1, ours is faster. Calls take turns on several sets of inputs, so the "
    "cache holds less of them. The limit is the nearer one of products and copies; shares of it are those of the graph "
    "where there is one, and what is wanted is held against the ratio of graphs where there is one."
)


def _sound(one: Record) -> bool:
    """Whether a record has what the tables read of it."""
    try:
        _KINDS[one["kind"]](one)
        return all(isinstance(one[name], str) for name in ("step", *_NAMED.get(one["kind"], ())))
    except (AttributeError, ArithmeticError, KeyError, LookupError, TypeError, ValueError):
        return False


def _read_bench(one: Record) -> None:
    _ratio_line(one, [one], None)
    _verdict(one, 1.0)
    if one["median"] is not None:
        _runner(one)


def _read_failure(one: Record) -> str:
    return f"{one['step']}: {one['problem']}"


def _latest(records: Iterable[Record]) -> list[Record]:
    found: dict[tuple[Any, ...], Record] = {}
    for one in records:
        key = one["step"], one["pass"], one["runner"], one["backend"]
        found[key] = one  # where its key was first
    return list(found.values())


# ---------------------------------------------------------------- ratios


def ratios(bench: Sequence[Record], ceilings: Mapping[str, Record]) -> list[tuple[str, ...]]:
    """A line for each job, pass and backend of this package that is right."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for one in bench:
        groups.setdefault((one["step"], one["pass"]), []).append(one)
    found = []
    for group in groups.values():
        for ours in group:
            if ours["runner"] == OURS and ours["median"] is not None and ours["problem"] is None:
                found.append(_ratio_line(ours, group, ceilings.get(ours["dtype"])))
    return found


def best_peer(group: Sequence[Record], of: str) -> Record | None:
    """The right peer with the shortest time, eager ("median") or as a graph ("graph")."""
    timed = [one for one in group if one["runner"] != OURS and one["problem"] is None and one[of] is not None]
    return min(timed, key=lambda one: float(one[of]), default=None)


def ratio(ours: Record, group: Sequence[Record], of: str) -> float | None:
    """The best peer's time over ours; None where either has none."""
    peer = best_peer(group, of)
    if not ours[of] or peer is None:
        return None
    return float(peer[of]) / float(ours[of])


def of_limit(one: Record, ceiling: Record | None) -> tuple[float, str] | None:
    """The share of the machine's nearer limit, and which that is."""
    seconds = one["graph"] or one["median"]
    if ceiling is None or not seconds or not one["flops"]:
        return None
    shares = (one["flops"] / ceiling["gemm"], "GEMM"), (one["bytes"] / ceiling["copy"], "copy")
    limit, name = max(shares)
    return limit / seconds, name


def _ratio_line(ours: Record, group: Sequence[Record], ceiling: Record | None) -> tuple[str, ...]:
    eager, graph = (ratio(ours, group, of) for of in ("median", "graph"))
    limit = of_limit(ours, ceiling)
    mean = ours["tokens"] / max(ours["rows"], 1)
    return (
        ours["step"],
        f"{ours['op']}, {ours['rows']} x {mean:.0f} ({ours['longest']}), {ours['sizes']}",
        ours["dtype"],
        ours["pass"],
        ours["backend"],
        _time(ours["median"]),
        _peer(group, "median"),
        _times(eager),
        _time(ours["graph"]),
        _peer(group, "graph"),
        _times(graph),
        f"{limit[0]:.0%} {limit[1]}" if limit else "-",
        _verdict(ours, eager if graph is None else graph),
    )


def _verdict(ours: Record, found: float | None) -> str:
    wanted = ours["wanted"]
    if wanted is None or found is None:
        return "-"
    verdict = "pass" if found >= wanted else "MISS"
    return f">= {wanted:g}x {'(rehearsal)' if ours['tiny'] else verdict}"


def _peer(group: Sequence[Record], of: str) -> str:
    peer = best_peer(group, of)
    return f"{_time(peer[of])} ({peer['runner']})" if peer else "-"


# ---------------------------------------------------------------- the other tables


def _ceiling(one: Record) -> tuple[str, ...]:
    return (
        one["dtype"],
        f"{one['gemm'] / 1e12:.3g} TFLOP/s ({one['size']}^3)",
        f"{one['gemm_spread']:.0%}",
        f"{one['copy'] / 1e9:.4g} GB/s ({one['copied'] / 2**30:.3g} GiB)",
        f"{one['copy_spread']:.0%}",
    )


def _runner(one: Record) -> tuple[str, ...]:
    seconds = one["graph"] or one["median"]
    name = f"{OURS} ({one['backend']})" if one["runner"] == OURS else one["runner"]
    name += ", WRONG" if one["problem"] is not None else ""
    return (
        one["step"],
        one["pass"],
        name,
        _time(one["median"]),
        f"{one['spread']:.0%} of {one['samples']}",
        _time(one["graph"]) if one["graph"] is not None else str(one["graph_problem"] or "-").replace("|", "/"),
        f"{one['peak'] / 2**20:.1f} MiB" if one["peak"] is not None else "-",
        f"{one['flops'] / seconds / 1e12:.3g}" if seconds else "-",
        f"{one['bytes'] / seconds / 1e9:.0f}" if seconds else "-",
    )


def _by_check(checks: Sequence[Record]) -> list[tuple[str, ...]]:
    """A line for each check and backend; those about the same call are one."""
    found: dict[tuple[str, str], list[Record]] = {}
    for one in checks:
        found.setdefault((one["step"], one["backend"]), []).append(one)

    def count(group: Sequence[Record], holds: Callable[[Any], bool]) -> str:
        return str(sum(holds(one["ok"]) for one in group))

    return [
        (
            *key,
            str(len(group)),
            count(group, lambda ok: ok is True),
            count(group, lambda ok: ok is False),
            count(group, lambda ok: ok is None),
        )
        for key, group in found.items()
    ]


def _wrong(checks: Sequence[Record], known: Sequence[Record]) -> list[str]:
    """What this package does wrong, or what ended too early."""
    found = []
    for one in checks:
        if one["ok"] is False:
            found.append(_read_check(one))
    for one in known:
        if one["kind"] == "failed":
            found.append(_read_failure(one))
    for one in _latest(one for one in known if one.get("kind") == "bench"):
        if one["runner"] == OURS and one["problem"] is not None:
            found.append(f"{one['step']} ({one['backend']}), {one['pass']}: {one['problem']}")
    return found


def _read_check(one: Record) -> str:
    row = f", row {one['row']}" if one["row"] is not None else ""
    return f"{one['step']} ({one['backend']}), {one['what']}, {one['dtype']}{row}: {one['problem']}"


def _not_timed(bench: Sequence[Record]) -> list[str]:
    """Peers without a time, and why: a line for each reason, with the jobs, and their pass where it is only one."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for one in bench:
        if one["runner"] != OURS and one["problem"] is not None:
            jobs = found.setdefault((one["runner"], str(one["problem"])), {})
            jobs.setdefault(one["step"], []).append(one["pass"])
    lines = []
    for (runner, problem), jobs in found.items():
        where = (f"{job}, {passes[0]}" if len(passes) == 1 else job for job, passes in jobs.items())
        lines.append(f"{runner}: {problem} ({'; '.join(where)})")
    return lines


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _times(found: float | None) -> str:
    return f"{found:.2f}x" if found is not None else "-"


# What is read of a record of each kind, and which of its fields are names.
_KINDS: Mapping[str, Callable[[Record], object]] = {
    "ceiling": _ceiling,
    "bench": _read_bench,
    "check": lambda one: (_read_check(one), one["ok"]),
    "failed": _read_failure,
}
_NAMED = {
    "ceiling": ("dtype",),
    "bench": ("pass", "runner", "backend", "dtype"),
    "check": ("backend", "what", "dtype"),
}
