"""Measurements as tables (terminal or Markdown) with their targets, and as JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from interformer_bench import targets
from interformer_bench.memory import YARDSTICK, Peak
from interformer_bench.peers import OURS
from interformer_bench.run import PASSES, Measurement
from interformer_bench.sweeps import SWEEPS, Sweep
from interformer_bench.timing import Rates

from interformer_kernels import _backend
from interformer_kernels._files import to_json, write_text

# Two threads multiply large matrices faster than one, by this at least, where they have a core each.
_SCALES = 1.4
_FIGURE = re.compile(r"\b\d[\d.]*(?:e[-+]?\d+)?\b")
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
    """What a run of the bench has found; `sweeps` by their axis."""

    measurements: Sequence[Measurement]
    machine: Machine
    peaks: Sequence[Peak] = ()
    calls: Sequence[tuple[str, str, str]] = ()
    sweeps: Mapping[str, Sequence[Measurement]] = field(default_factory=dict)

    def everything(self) -> list[Measurement]:
        """All that was timed, or was not."""
        return [*self.measurements, *(one for swept in self.sweeps.values() for one in swept)]


def groups(measurements: Iterable[Measurement]) -> list[Group]:
    """The runners of each (op, shape, dtype, threads, pass), by name, in the order they were measured."""
    found: dict[tuple[object, ...], Group] = {}
    for one in measurements:
        key = one.op, one.law, one.rows, one.sizes, one.dtype, one.device, one.threads, one.direction
        found.setdefault(key, {})[one.runner] = one
    return list(found.values())


def best_peer(group: Group, of: str = "") -> Measurement | None:
    """The fastest right peer; where `of` is given, of that group."""
    timed = [one for name, one in group.items() if name != OURS and one.median is not None and of in ("", one.group)]
    return min(timed, key=lambda one: one.median or 0.0, default=None)


def ratio(group: Group, of: str = "") -> float | None:
    """How many times as long the best peer takes; None where either was not timed."""
    mine, theirs = group[OURS].median, best_peer(group, of)
    return theirs.median / mine if mine and theirs and theirs.median else None


def of_limit(one: Measurement, machine: Machine) -> tuple[str, float] | None:
    """The nearer limit of the machine (products or copies), and the share of it that was reached."""
    rates = ceilings(machine, one.dtype, one.threads)
    if rates is None or not one.median:
        return None
    shares = {"GEMM": one.flops / rates.gemm / one.median, "copy": one.bytes / rates.copy / one.median}
    return max(shares.items(), key=lambda item: item[1])


def ceilings(machine: Machine, dtype: str, threads: int) -> Rates | None:
    """The rates that limit a dtype: 16-bit numbers may be widened, so a slow product of theirs is no limit."""
    rates, wide = machine.get((dtype, threads)), machine.get(("float32", threads))
    return rates if rates is None or wide is None else replace(rates, gemm=max(rates.gemm, wide.gemm))


def of_gemm(one: Measurement, machine: Machine) -> float | None:
    """The share of the rate of matrix products."""
    rates = machine.get((one.dtype, one.threads))
    return one.flops / rates.gemm / one.median if rates and one.median else None


def back_over_forth(group: Group, measured: Mapping[tuple[object, ...], float]) -> float | None:
    """The time of the backward over that of the forward, from the two passes of this package."""
    ours = group[OURS]
    forward = measured.get(_forward_key(ours))
    return (ours.median - forward) / forward if ours.direction != PASSES[0] and ours.median and forward else None


def _forward_key(one: Measurement) -> tuple[object, ...]:
    return one.op, one.law, one.rows, one.sizes, one.dtype, one.device, one.threads


def forwards(measurements: Iterable[Measurement]) -> dict[tuple[object, ...], float]:
    """Seconds of this package's forward, by shape."""
    return {
        _forward_key(one): one.median
        for one in measurements
        if one.runner == OURS and one.direction == PASSES[0] and one.median
    }


# ---------------------------------------------------------------- targets


@dataclass(frozen=True)
class Judged:
    """One target of one line: what is wanted, what was found, and whether that is enough."""

    text: str
    found: float
    ok: bool

    def __str__(self) -> str:
        return f"{self.text}: {self.found:.2f} {'pass' if self.ok else 'MISS'}"


def judge(group: Group, machine: Machine, back: float | None) -> list[Judged]:
    """The targets of a line; those of issue tables hold on `targets.THREADS` threads, the floor everywhere."""
    ours = group[OURS]
    if ours.median is None:
        return []
    found = []
    plain = ratio(group)
    if plain is not None:
        found.append(Judged(f">= {targets.FLOOR:g}x", plain, plain >= targets.FLOOR))
    if ours.threads != targets.THREADS:
        return found
    target = targets.target(ours.kind, ours.dtype)
    for of, least in target.ratios(ours.direction).items():
        reached = ratio(group, of)
        if reached is not None:
            found.append(Judged(f">= {least:g}x {of}".rstrip(), reached, reached >= least))
    share = of_gemm(ours, machine)
    if ours.direction == PASSES[0] and target.gemm is not None and share is not None:
        found.append(Judged(f">= {target.gemm:g} of GEMM", share, share >= target.gemm))
    if back is not None:
        most = targets.BACKWARD_OVER_FORWARD
        found.append(Judged(f"back / forth <= {most:g}", back, back <= most))
    return found


def level() -> str:
    """The instruction set that the kernels take on this machine."""
    native = _backend.native()
    return str(native.build_info()["cpu_level"]) if native is not None else "none: the native module is not there"


# ---------------------------------------------------------------- tables


def table(measurements: Sequence[Measurement], machine: Machine) -> list[tuple[str, ...]]:
    """A line per (shape, dtype, threads, pass): this package against its best peer, and its targets.

    The spread is that of the quartiles.
    """
    first = forwards(measurements)
    lines: list[tuple[str, ...]] = []
    for group in groups(measurements):
        ours, peer, times = group[OURS], best_peer(group), ratio(group)
        limit = of_limit(ours, machine)
        back = back_over_forth(group, first)
        judged = judge(group, machine, back)
        lines.append(
            (
                law_of(ours.law, ours.source),
                f"{ours.rows} x {ours.tokens / max(ours.rows, 1):.0f} ({ours.longest})",
                ours.sizes,
                ours.dtype,
                str(ours.threads),
                ours.direction,
                f"{time_of(ours)} ({ours.backend})",
                f"{time_of(peer)} ({peer.runner})" if peer else "none timed",
                ", ".join(name for name, one in group.items() if one.median is None) or "-",
                f"{times:.2f}x" if times else "-",
                f"{limit[1]:.2f} {limit[0]}" if limit else "-",
                f"{back:.2f}" if back is not None else "-",
                _spread(ours),
                "; ".join(map(str, judged)) or "-",
            )
        )
    return lines


def law_of(name: str, source: str) -> str:
    """A law of lengths, and where it is from if it is of real histories."""
    return name if source == "synthetic" else f"{name} ({source})"


def by_op(made: Report) -> dict[str, list[tuple[str, ...]]]:
    """The table of each op."""
    ops = dict.fromkeys(one.op for one in made.measurements)
    return {op: table([one for one in made.measurements if one.op == op], made.machine) for op in ops}


def sweep_table(about: Sweep, measured: Sequence[Measurement]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns, and a line for each pass and place: everybody's median, and the best peer's over ours."""
    names = tuple(dict.fromkeys(one.runner for one in measured))
    found = []
    for direction in PASSES:
        for group in groups(one for one in measured if one.direction == direction):
            times = ratio(group)
            cells = (time_of(group[name]) if name in group else "-" for name in names)
            found.append((direction, f"{about.at(group[OURS]):.4g}", *cells, f"{times:.2f}x" if times else "-"))
    return ("pass", about.label, *names, "ratio"), found


def problems(measurements: Iterable[Measurement]) -> list[str]:
    """What was not timed, and why: a line per op, runner and kind of reason, then the shapes with their figures."""
    told: dict[tuple[str, str, str], dict[str, None]] = {}
    for one in measurements:
        if one.problem is None:
            continue
        # Figures differ from shape to shape: they go with the shape.
        kind = one.problem if one.runner == OURS else _FIGURE.sub("..", one.problem)
        figures = " ".join(_FIGURE.findall(one.problem)) if kind != one.problem else ""
        shape = f"{one.law}, {one.sizes}, {one.dtype}, {one.direction}"
        told.setdefault((one.op, one.runner, kind), {})[f"{shape}: {figures}" if figures else shape] = None
    return [f"{op}: {runner} {kind} ({'; '.join(shapes)})" for (op, runner, kind), shapes in told.items()]


def missed(made: Report) -> list[str]:
    """Every target of a line that was not reached."""
    first = forwards(made.measurements)
    found = []
    for group in groups(made.measurements):
        one = group[OURS]
        for judged in judge(group, made.machine, back_over_forth(group, first)):
            if not judged.ok:
                where = f"{one.op}, {one.law}, {one.sizes}, {one.dtype}, {one.threads} threads, {one.direction}"
                found.append(f"{where}: {judged}")
    return found


def time_of(one: Measurement) -> str:
    """Its median with a unit."""
    if one.median is None:
        return "-"
    return f"{one.median:.3g} s" if one.median >= 1 else f"{one.median * 1e3:.3g} ms"


def _spread(one: Measurement) -> str:
    """Of the quartiles, and of how many samples."""
    if not one.median or one.low is None or one.high is None:
        return "-"
    return f"{(one.high - one.low) / one.median:.0%} of {one.samples}" if one.samples > 2 else f"{one.samples} only"


def rates(machine: Machine) -> str:
    """The machine in words."""
    parts = [
        f"{dtype}, {threads} threads: GEMM {one.gemm / 1e9:.3g} GFLOP/s ({one.size}^3), copy {one.copy / 1e9:.1f} GB/s"
        for (dtype, threads), one in machine.items()
    ]
    held = "targets hold" if level() in targets.LEVELS else f"targets are for {' and '.join(targets.LEVELS)}"
    text = f"Kernels: {level()} ({held}; >= {targets.FLOOR:g}x the best peer is promised on AVX2 too)."
    return " ".join(["; ".join(["In the same run", *parts]) + ".", text, *_busy(machine)])


def _busy(machine: Machine) -> list[str]:
    """A warning where more threads did not multiply matrices faster: somebody else had the cores."""
    found = []
    for (dtype, threads), one in machine.items():
        single = machine.get((dtype, 1))
        if single is not None and threads > 1 and one.gemm < _SCALES * single.gemm:
            told = f"{threads} threads multiplied {dtype} at {one.gemm / single.gemm:.1f} times the rate of one"
            found.append(f"THE CORES WERE BUSY: {told}; times on {threads} threads are not to be trusted.")
    return found


def memory_table(peaks: Sequence[Peak]) -> list[tuple[str, ...]]:
    """Peak memory beyond inputs and outputs, and its share of padded SDPA's."""
    padded = {
        (one.op, one.law, one.sizes, one.direction): one.extra for one in peaks if one.runner == YARDSTICK[one.op]
    }
    lines: list[tuple[str, ...]] = []
    for one in peaks:
        whole, share = padded.get((one.op, one.law, one.sizes, one.direction)), "-"
        if one.extra is not None and whole:
            share = f"{one.extra / whole:.0%}"
            if one.runner == OURS:
                share += " pass" if one.extra <= targets.MEMORY * whole else " MISS"
        found = f"{one.extra / 2**20:.2f} MiB" if one.extra is not None else str(one.problem)
        lines.append((one.op, one.law, one.sizes, one.direction, one.runner, found, share))
    return lines


# ---------------------------------------------------------------- files


def markdown(made: Report, pictures: Sequence[str] = ()) -> str:
    """Everything in Markdown: a table per op, the machine's rates, memory, calls, targets missed, problems."""
    parts = []
    for op, lines in by_op(made).items():
        parts += [f"## {op}", rows(COLUMNS, lines)]
    for axis, measured in made.sweeps.items():
        parts += [f"## Time against {axis}", SWEEPS[axis].title(), rows(*sweep_table(SWEEPS[axis], measured))]
    if made.machine:
        parts += ["## The machine", rates(made.machine)]
    if made.peaks:
        parts += ["## Peak memory beyond inputs and outputs", rows(MEMORY_COLUMNS, memory_table(made.peaks))]
    if made.calls:
        parts += ["## The cost of a call", rows(CALL_COLUMNS, made.calls)]
    if pictures:
        parts += ["## Pictures", *(f"![{name}]({name})" for name in pictures)]
    for title, found in (("Targets missed", missed(made)), ("Not timed", problems(made.everything()))):
        if found:
            parts += [f"## {title}", "\n".join(f"- {line}" for line in found)]
    return "\n\n".join(parts) + "\n"


def rows(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *lines))


def write_json(path: Path, made: Report) -> None:
    """All of it."""
    write_text(path, to_json(plain(made)))


def plain(made: Report) -> dict[str, Any]:
    """All of it, as JSON has it."""
    return {
        "level": level(),
        "machine": [{"dtype": name, "threads": n, **asdict(one)} for (name, n), one in made.machine.items()],
        "measurements": [asdict(one) for one in made.measurements],
        "memory": [asdict(one) for one in made.peaks],
        "calls": made.calls,
        "sweeps": {axis: [asdict(one) for one in swept] for axis, swept in made.sweeps.items()},
    }
