"""Measurements as tables (terminal or Markdown) with their targets, and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from interformer_bench import quiet, targets, waiting
from interformer_bench.calls import CostRow
from interformer_bench.memory import YARDSTICK, Peak
from interformer_bench.peers import OURS
from interformer_bench.run import PASSES, Measurement
from interformer_bench.sweeps import SWEEPS, Sweep
from interformer_bench.timing import Rates

from interformer_kernels import _backend
from interformer_kernels._files import to_json, write_text

# With a core each, two threads multiply large matrices at least this much faster than one.
_MIN_SPEEDUP = 1.4
_NUMBER = re.compile(r"\b\d[\d.]*(?:e[-+]?\d+)?\b")
Group = dict[str, Measurement]
Machine = Mapping[tuple[str, int], Rates]

COLUMNS = (
    "lengths",
    "rows x mean (longest)",
    "sizes",
    "dtype",
    "threads",
    "pass",
    "interformer",
    "best peer",
    "threads used",
    "not timed",
    "ratio",
    "of limit",
    "back / forth",
    "spread",
    "targets",
)
CALL_COLUMNS = ("what", "found", "target")
MEMORY_COLUMNS = ("op", "lengths", "sizes", "pass", "runner", "peak", "of padded")


@dataclass(frozen=True)
class Report:
    """The results of a run of the bench; `sweeps` are by axis, and `checks` say whether the machine was quiet."""

    measurements: Sequence[Measurement]
    machine: Machine
    peaks: Sequence[Peak] = ()
    calls: Sequence[CostRow] = ()
    sweeps: Mapping[str, Sequence[Measurement]] = field(default_factory=dict)
    checks: Sequence[quiet.Quietness] = ()

    def everything(self) -> list[Measurement]:
        """All measurements, of sweeps too, with a time or without."""
        return [*self.measurements, *(measurement for swept in self.sweeps.values() for measurement in swept)]


def groups(measurements: Iterable[Measurement]) -> list[Group]:
    """The runners of each (op, shape, dtype, threads, pass) by name, in the order they were measured."""
    by_key: dict[tuple[object, ...], Group] = {}
    for m in measurements:
        key = m.op, m.law, m.rows, m.sizes, m.dtype, m.device, m.threads, m.direction
        by_key.setdefault(key, {})[m.runner] = m
    return list(by_key.values())


def best_peer(group: Group, peer_group: str = "") -> Measurement | None:
    """The fastest right peer, of all or of the named group of peers."""
    peers = [m for name, m in group.items() if name != OURS and peer_group in ("", m.group)]
    return min((m for m in peers if m.median is not None), key=lambda m: m.median or 0.0, default=None)


def ratio(group: Group, peer_group: str = "") -> float | None:
    """The best peer's time over ours; None where either was not timed, or the machine was busy."""
    if group[OURS].busy:
        return None
    seconds, peer = group[OURS].median, best_peer(group, peer_group)
    return peer.median / seconds if seconds and peer and peer.median else None


def of_limit(measurement: Measurement, machine: Machine) -> tuple[str, float] | None:
    """The nearer limit of the machine (products or copies), and the share of it that was reached."""
    rates = ceilings(machine, measurement.dtype, measurement.threads)
    if rates is None or not measurement.median or measurement.busy:
        return None
    seconds = measurement.median
    shares = {"GEMM": measurement.flops / rates.gemm / seconds, "copy": measurement.bytes / rates.copy / seconds}
    return max(shares.items(), key=lambda item: item[1])


def ceilings(machine: Machine, dtype: str, threads: int) -> Rates | None:
    """The rates that limit a dtype: 16-bit numbers can be widened, so their own product, if slow, is no limit."""
    rates, wide = machine.get((dtype, threads)), machine.get(("float32", threads))
    return rates if rates is None or wide is None else replace(rates, gemm=max(rates.gemm, wide.gemm))


def of_gemm(measurement: Measurement, machine: Machine) -> float | None:
    """The share of the rate of matrix products that was reached."""
    rates = machine.get((measurement.dtype, measurement.threads))
    return measurement.flops / rates.gemm / measurement.median if rates and measurement.median else None


def backward_over_forward(group: Group, forward_seconds: Mapping[tuple[object, ...], float]) -> float | None:
    """The time of the backward over that of the forward, from the two passes of this package."""
    ours = group[OURS]
    if ours.busy:
        return None
    forward = forward_seconds.get(_forward_key(ours))
    return (ours.median - forward) / forward if ours.direction != PASSES[0] and ours.median and forward else None


def _forward_key(m: Measurement) -> tuple[object, ...]:
    return m.op, m.law, m.rows, m.sizes, m.dtype, m.device, m.threads


def forward_times(measurements: Iterable[Measurement]) -> dict[tuple[object, ...], float]:
    """Seconds of this package's forward on a quiet machine, by shape."""
    forwards = (m for m in measurements if m.runner == OURS and m.direction == PASSES[0])
    return {_forward_key(m): m.median for m in forwards if m.median and not m.busy}


# ---------------------------------------------------------------- targets


@dataclass(frozen=True)
class JudgedTarget:
    """One target of a row of the table: the target in words, the value reached, and whether it suffices."""

    text: str
    value: float
    ok: bool

    def __str__(self) -> str:
        return f"{self.text}: {self.value:.2f} {'pass' if self.ok else 'MISS'}"


def judge(group: Group, machine: Machine, back: float | None) -> list[JudgedTarget]:
    """The targets of a row: those of its kind hold on `targets.THREADS` threads, the floor everywhere.

    Nothing is judged where the machine was busy.
    """
    ours = group[OURS]
    if ours.median is None or ours.busy:
        return []
    judged = []
    to_best = ratio(group)
    if to_best is not None:
        judged.append(JudgedTarget(f">= {targets.FLOOR:g}x", to_best, to_best >= targets.FLOOR))
    if ours.threads != targets.THREADS:
        return judged
    target = targets.target(ours.kind, ours.dtype)
    for peer_group, minimum in target.ratios(ours.direction).items():
        reached = ratio(group, peer_group)
        if reached is not None:
            judged.append(JudgedTarget(f">= {minimum:g}x {peer_group}".rstrip(), reached, reached >= minimum))
    share = of_gemm(ours, machine)
    if ours.direction == PASSES[0] and target.gemm is not None and share is not None:
        judged.append(JudgedTarget(f">= {target.gemm:g} of GEMM", share, share >= target.gemm))
    if back is not None:
        maximum = targets.BACKWARD_OVER_FORWARD
        judged.append(JudgedTarget(f"back / forth <= {maximum:g}", back, back <= maximum))
    return judged


def isa() -> str:
    """The instruction set that the CPU kernels use on this machine."""
    native = _backend.native()
    return str(native.build_info()["cpu_level"]) if native is not None else "none: the native module is not there"


# ---------------------------------------------------------------- tables


def table(measurements: Sequence[Measurement], machine: Machine) -> list[tuple[str, ...]]:
    """A row per (shape, dtype, threads, pass): this package against its best peer, and its targets.

    The spread is the distance of the quartiles.
    """
    forward_seconds = forward_times(measurements)
    table_rows: list[tuple[str, ...]] = []
    for group in groups(measurements):
        ours, peer, times = group[OURS], best_peer(group), ratio(group)
        limit = of_limit(ours, machine)
        back = backward_over_forward(group, forward_seconds)
        judged = judge(group, machine, back)
        table_rows.append(
            (
                distribution_label(ours.law, ours.source),
                f"{ours.rows} x {ours.tokens / max(ours.rows, 1):.0f} ({ours.longest})",
                ours.sizes,
                ours.dtype,
                str(ours.threads),
                ours.direction,
                f"{time_of(ours)} ({ours.backend})",
                f"{time_of(peer)} ({peer.runner})" if peer else "none timed",
                f"{ours.best_threads or '-'}, {peer.best_threads or '-' if peer else '-'}",
                ", ".join(name for name, m in group.items() if m.median is None) or "-",
                _ratio_cell(ours, times),
                f"{limit[1]:.2f} {limit[0]}" if limit else "-",
                f"{back:.2f}" if back is not None else "-",
                _spread(ours),
                ours.busy or "; ".join(map(str, judged)) or "-",
            )
        )
    return table_rows


def _ratio_cell(ours: Measurement, times: float | None) -> str:
    if ours.busy:
        return quiet.NO_RATIO
    return f"{times:.2f}x" if times else "-"


def distribution_label(name: str, source: str) -> str:
    """The name of a distribution of lengths, with its source unless it is synthetic."""
    return name if source == "synthetic" else f"{name} ({source})"


def by_op(report: Report) -> dict[str, list[tuple[str, ...]]]:
    """The table of each op."""
    ops = dict.fromkeys(m.op for m in report.measurements)
    return {op: table([m for m in report.measurements if m.op == op], report.machine) for op in ops}


def sweep_table(sweep: Sweep, measured: Sequence[Measurement]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns, and a row for each pass and place: every runner's median, and the best peer's over ours."""
    names = tuple(dict.fromkeys(m.runner for m in measured))
    table_rows = []
    for direction in PASSES:
        for group in groups(m for m in measured if m.direction == direction):
            times = ratio(group)
            cells = (_time_and_threads(group[name]) if name in group else "-" for name in names)
            place = f"{sweep.at(group[OURS]):.4g}"
            table_rows.append((direction, place, *cells, _ratio_cell(group[OURS], times)))
    return ("pass", sweep.label, *names, "ratio"), table_rows


def problems(measurements: Iterable[Measurement]) -> list[str]:
    """Reasons for not timing runners: a line per op, runner and kind of reason, then the shapes with their numbers."""
    return _by_reason((m, m.problem) for m in measurements)


def dropped(measurements: Iterable[Measurement]) -> list[str]:
    """Reasons for not trying runners on fewer threads, in the same form."""
    return _by_reason((m, m.dropped) for m in measurements)


def _by_reason(reasons: Iterable[tuple[Measurement, str | None]]) -> list[str]:
    shapes_by_reason: dict[tuple[str, str, str], dict[str, None]] = {}
    for m, reason in reasons:
        if reason is None:
            continue
        # Numbers differ from shape to shape, so they are listed with the shape.
        kind = reason if m.runner == OURS else _NUMBER.sub("..", reason)
        numbers = " ".join(_NUMBER.findall(reason)) if kind != reason else ""
        shape = f"{m.law}, {m.sizes}, {m.dtype}, {m.direction}"
        shapes_by_reason.setdefault((m.op, m.runner, kind), {})[f"{shape}: {numbers}" if numbers else shape] = None
    return [f"{op}: {runner} {kind} ({'; '.join(shapes)})" for (op, runner, kind), shapes in shapes_by_reason.items()]


def missed(report: Report) -> list[str]:
    """Every target of a row that was not reached."""
    forward_seconds = forward_times(report.measurements)
    texts = []
    for group in groups(report.measurements):
        m = group[OURS]
        for judged in judge(group, report.machine, backward_over_forward(group, forward_seconds)):
            if not judged.ok:
                case = f"{m.op}, {m.law}, {m.sizes}, {m.dtype}, {m.threads} threads, {m.direction}"
                texts.append(f"{case}: {judged}")
    return texts


def time_of(measurement: Measurement) -> str:
    """The median with its unit."""
    if measurement.median is None:
        return "-"
    return f"{measurement.median:.3g} s" if measurement.median >= 1 else f"{measurement.median * 1e3:.3g} ms"


def _time_and_threads(m: Measurement) -> str:
    """The median, with the number of threads where fewer than the most were best."""
    fewer = m.best_threads is not None and m.best_threads < m.threads
    return f"{time_of(m)} on {m.best_threads}" if fewer else time_of(m)


def _spread(m: Measurement) -> str:
    """The distance of the quartiles over the median, and the number of samples."""
    if not m.median or m.low is None or m.high is None:
        return "-"
    return f"{(m.high - m.low) / m.median:.0%} of {m.samples}" if m.samples > 2 else f"{m.samples} only"


def head(report: Report) -> str:
    """How the process waits, and whether the machine was quiet."""
    return f"{waiting.described()} {quiet.described(report.checks)}"


def rates(machine: Machine) -> str:
    """The machine's rates in words."""
    parts = [
        f"{dtype}, {threads} threads: GEMM {r.gemm / 1e9:.3g} GFLOP/s ({r.size}^3), copy {r.copy / 1e9:.1f} GB/s"
        for (dtype, threads), r in machine.items()
    ]
    held = "targets hold" if isa() in targets.ISAS else f"targets are for {' and '.join(targets.ISAS)}"
    text = f"Kernels: {isa()} ({held}; >= {targets.FLOOR:g}x the best peer is promised on AVX2 too)."
    return " ".join(["; ".join(["In the same run", *parts]) + ".", text, *_busy(machine)])


def _busy(machine: Machine) -> list[str]:
    """A warning where more threads did not multiply matrices faster, which other load on the machine explains."""
    warnings = []
    for (dtype, threads), parallel in machine.items():
        single = machine.get((dtype, 1))
        if single is not None and threads > 1 and parallel.gemm < _MIN_SPEEDUP * single.gemm:
            observed = (
                f"{threads} threads multiplied {dtype} at {parallel.gemm / single.gemm:.1f} times the rate of one"
            )
            warnings.append(f"THE CORES WERE BUSY: {observed}; times on {threads} threads are not to be trusted.")
    return warnings


def memory_table(peaks: Sequence[Peak]) -> list[tuple[str, ...]]:
    """Peak memory beyond inputs and outputs, and its share of padded SDPA's."""
    padded = {(p.op, p.law, p.sizes, p.direction): p.extra for p in peaks if p.runner == YARDSTICK[p.op]}
    table_rows: list[tuple[str, ...]] = []
    for peak in peaks:
        padded_bytes, share = padded.get((peak.op, peak.law, peak.sizes, peak.direction)), "-"
        if peak.extra is not None and padded_bytes:
            share = f"{peak.extra / padded_bytes:.0%}"
            if peak.runner == OURS:
                share += " pass" if peak.extra <= targets.MEMORY * padded_bytes else " MISS"
        size = f"{peak.extra / 2**20:.2f} MiB" if peak.extra is not None else str(peak.problem)
        table_rows.append((peak.op, peak.law, peak.sizes, peak.direction, peak.runner, size, share))
    return table_rows


# ---------------------------------------------------------------- files


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The whole report in Markdown: head, tables, rates, memory, costs of calls, missed targets, problems."""
    parts = [head(report)]
    for op, lines in by_op(report).items():
        parts += [f"## {op}", rows(COLUMNS, lines)]
    for axis, measured in report.sweeps.items():
        parts += [f"## Time against {axis}", SWEEPS[axis].title(), rows(*sweep_table(SWEEPS[axis], measured))]
    if report.machine:
        parts += ["## The machine", rates(report.machine)]
    if report.peaks:
        parts += ["## Peak memory beyond inputs and outputs", rows(MEMORY_COLUMNS, memory_table(report.peaks))]
    if report.calls:
        parts += ["## The cost of a call", rows(CALL_COLUMNS, report.calls)]
    if pictures:
        parts += ["## Pictures", *(f"![{name}]({name})" for name in pictures)]
    everything = report.everything()
    lists = {
        "Targets missed": missed(report),
        "Not timed": problems(everything),
        "Not tried on fewer threads": dropped(everything),
    }
    for title, items in lists.items():
        if items:
            parts += [f"## {title}", "\n".join(f"- {item}" for item in items)]
    return "\n\n".join(parts) + "\n"


def rows(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *lines))


def write_json(path: Path, report: Report) -> None:
    """Write the whole report as JSON."""
    write_text(path, to_json(plain(report)))


def plain(report: Report) -> dict[str, Any]:
    """The whole report as JSON values."""
    return {
        "level": isa(),
        "waiting": waiting.described(),
        "quiet": [{**asdict(check), "busy": check.busy} for check in report.checks],
        "machine": [{"dtype": name, "threads": n, **asdict(r)} for (name, n), r in report.machine.items()],
        "measurements": [asdict(measurement) for measurement in report.measurements],
        "memory": [asdict(peak) for peak in report.peaks],
        "calls": report.calls,
        "sweeps": {axis: [asdict(measurement) for measurement in swept] for axis, swept in report.sweeps.items()},
    }
