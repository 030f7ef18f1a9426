"""The measurements as a table with what is wanted, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from interformer_bench import quiet
from interformer_bench.rows.lines import GEMM, Line, Wanted
from interformer_bench.rows.measure import RowMeasurement

COLUMNS = (
    "line",
    "dtype",
    "rows x mean",
    "MB",
    "time",
    "spread",
    "ns / token",
    "GFLOP/s",
    "GB/s",
    "GEMM, copy",
    "of GEMM, copy",
    "speed of",
    "wanted",
)


def table(lines: Sequence[Line], measured: Sequence[RowMeasurement]) -> list[tuple[str, ...]]:
    """A row for each line and dtype."""
    wanted = {line.name: line.wanted for line in lines}
    by_key = {(m.line, m.dtype): m for m in measured}
    return [_row(m, wanted[m.line], by_key) for m in measured]


def _row(m: RowMeasurement, wanted: Wanted, by_key: dict[tuple[str, str], RowMeasurement]) -> tuple[str, ...]:
    rows = f"{m.rows} x {m.tokens / max(m.rows, 1):.1f}"
    if m.time is None:
        return (m.line, m.dtype, rows, *["-"] * 9, f"NOT TIMED: {m.problem}")
    seconds = m.time.median
    cells = (
        m.line,
        m.dtype,
        rows,
        f"{m.bytes / 1e6:.0f}",
        f"{seconds * 1e3:.3g} ms",
        f"{(m.time.high - m.time.low) / seconds:.0%} of {m.time.samples}",
        f"{seconds / max(m.tokens, 1) * 1e9:.1f}",
        f"{m.flops / seconds / 1e9:.3g}",
        f"{m.bytes / seconds / 1e9:.3g}",
        f"{m.gemm / 1e9:.3g}, {m.copy / 1e9:.3g}",
    )
    if m.busy:
        return (*cells, quiet.NO_RATIO, "-", m.busy)
    shares = f"{m.of_gemm:.2f}, {m.of_copy:.2f}"
    speeds = {name: speed(m, by_key.get((m.line, name))) for name in ("float32", "bfloat16") if name != m.dtype}
    shown = ", ".join(f"{name} {value:.2f}x" for name, value in speeds.items() if value and m.dtype != "float32")
    return (*cells, shares, shown or "-", "; ".join(judged(m, wanted, speeds)) or "-")


def speed(m: RowMeasurement, other: RowMeasurement | None) -> float | None:
    """The speed as a multiple of another dtype's; None where a ratio is not to be had."""
    if other is None or other.busy or m.busy or not other.time or not m.time:
        return None
    return other.time.median / m.time.median


def judged(m: RowMeasurement, wanted: Wanted, speeds: dict[str, float | None]) -> list[str]:
    """The shares and speeds that are wanted of a line, each with its verdict."""
    texts = []
    if m.dtype in wanted.share:
        found = m.of_gemm if wanted.of == GEMM else max(m.of_gemm, m.of_copy)
        texts.append(_verdict(f"{wanted.share[m.dtype]:g} of {wanted.of}", found, wanted.share[m.dtype]))
    if m.dtype in wanted.speed:
        minimum, other = wanted.speed[m.dtype]
        found_speed = speeds.get(other)
        if found_speed:
            texts.append(_verdict(f"{minimum:g}x {other}", found_speed, minimum))
    return texts


def _verdict(text: str, found: float, minimum: float) -> str:
    return f">= {text}: {found:.2f} {'pass' if found >= minimum else 'MISS'}"


def plain(measured: Sequence[RowMeasurement], checks: Sequence[quiet.Quietness], head: str) -> dict[str, Any]:
    """Everything as JSON values."""
    lines = [{**asdict(m), "of_copy": m.of_copy, "of_gemm": m.of_gemm} for m in measured]
    return {"head": head, "quiet": [asdict(check) for check in checks], "lines": lines}
