"""`results.jsonl`: a line for each result, appended at once by the process that has it. Damaged lines do no harm.

Lines of the report itself: `report` where one begins (with commit and tools), `begin` and `step` (status, seconds, last
lines of output) around every step. Results of steps have kinds of their own, and name their `step`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = "results.jsonl"
OK, CUT_OFF, OUT_OF_TIME = "ok", "cut off", "out of time"
NOT_STARTED, MISSING = "not started: ", "missing: "  # the reason follows
_LONGEST = 1 << 20  # bytes; no line of a report is longer
_MOST_BEGINS = 100  # places in a damaged line at which a record may begin
Record = dict[str, Any]
_Kinds = type | tuple[type, ...]
_NUMBER: _Kinds = (int, float)
_MAYBE: tuple[type, ...] = (int, float, type(None))
_TEXT: tuple[type, ...] = (str, type(None))
# By kind of record, the fields that are read, and their types.
_FIELDS: dict[str, dict[str, _Kinds]] = {
    "begin": {"step": str, "records": list, "backend": _TEXT},
    "step": {"step": str, "status": str, "seconds": _NUMBER, "last": list},
    "report": {"commit": str, "tools": dict},
    "kit": {"said": list},
    "backend": {"backend": str, "why_not": dict},
    "job": {"program": str, "job": dict},
    "parity": {
        **dict.fromkeys(("backend", "op", "dtype", "case", "quantity"), str),
        **{"ok": bool, "share": _MAYBE, "problem": _TEXT},
    },
    **{kind: {"step": str, "ok": (bool, type(None))} for kind in ("check", "smoke", "determinism")},
    "ceiling": {"dtype": str, "gemm": _NUMBER, "copy": _NUMBER},
    "bench": {
        **dict.fromkeys(("step", "pass", "runner", "backend"), str),
        **{"median": _MAYBE, "graph": _MAYBE, "wanted": _MAYBE, "problem": _TEXT},
    },
    "first": {"backend": str, "op": str, "first": _NUMBER, "second": _NUMBER},
}


def _files() -> Any:
    """`interformer_kernels._files` without its package, which imports torch."""
    spec = importlib.util.spec_from_file_location("_files", ROOT / "interformer_kernels" / "_files.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


files = _files()


# ---------------------------------------------------------------- lines


def read(path: Path, start: int = 0) -> tuple[list[Record], int]:
    """The records from byte `start` on, and how many lines are not one, or hold something else besides."""
    records: list[Record] = []
    damaged = 0
    for line in _lines(path, start):
        record, begin = _record(line)
        records += [record] if record else []
        damaged += record is None or begin > 0
    return records, damaged


def _lines(path: Path, start: int) -> Iterator[bytes]:
    """Lines that are not empty, each cut off where it is longer than any of a report."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        whole = True
        while line := file.readline(_LONGEST):
            if whole and line.strip():
                yield line
            whole = line.endswith(b"\n")


def _record(line: bytes) -> tuple[Record | None, int]:
    """The record, and where it begins: not at 0 where a writer was cut off, and the next one went on in its line."""
    begins = (match.start() for match in re.finditer(rb'\{"', line))
    for begin in itertools.islice(begins, _MOST_BEGINS):
        try:
            record = json.loads(line[begin:])
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and _makes_sense(record):
            return record, begin
    return None, 0


def _makes_sense(record: Record) -> bool:
    """Whether it has the fields of its kind; a step may write anything."""
    fields = {"kind": str, **_FIELDS.get(str(record.get("kind")), {})}
    return all(name in record and isinstance(record[name], kinds) for name, kinds in fields.items())


def mend(path: Path) -> None:
    """End a last line that was cut off, so that the next record has a line of its own."""
    if path.exists() and (size := path.stat().st_size):
        with open(path, "r+b") as file:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")


# ---------------------------------------------------------------- steps


@dataclass
class Try:
    """One run of a step: what it found, and how it ended."""

    step: str
    status: str = CUT_OFF
    seconds: float = 0.0
    last: list[str] = field(default_factory=list)
    left_behind: int = 0
    records: list[Record] = field(default_factory=list)
    names: Sequence[str] = ()
    backend: str | None = None

    @property
    def begun(self) -> bool:
        """Whether it was started."""
        return not self.status.startswith((NOT_STARTED, MISSING))

    def has(self, record: Record) -> bool:
        """Whether a record says that this step found it."""
        of_backend = self.backend is None or record.get("backend") == self.backend
        return record.get("step") in (self.names or (self.step,)) and of_backend

    @property
    def ok(self) -> bool:
        """Whether it ended well."""
        return self.status == OK


def tries(records: list[Record]) -> dict[str, Try]:
    """The try of every step that counts: the last that ended well, otherwise the one with most records."""
    by_step: dict[str, list[Try]] = {}
    running: dict[str, Try] = {}
    for record in records:
        step = str(record.get("step"))
        if record["kind"] == "report":  # a report begins: what ran when an earlier one was killed runs no more
            running.clear()
        if record["kind"] == "begin":
            running[step] = Try(step, names=record.get("records") or (), backend=record.get("backend"))
            by_step.setdefault(step, []).append(running[step])
        elif record["kind"] == "step":
            attempt = running.pop(step, None) or Try(step)
            if attempt not in by_step.setdefault(step, []):
                by_step[step].append(attempt)
            attempt.status, attempt.seconds = str(record.get("status")), record.get("seconds") or 0.0
            attempt.last, attempt.left_behind = record.get("last") or [], record.get("left_behind") or 0
        else:
            owners = [attempt for attempt in running.values() if attempt.has(record)]
            attempt = owners[0] if owners else by_step.setdefault(step, [Try(step, OK)])[-1]
            attempt.records.append(record)
    return {step: _best(all_tries) for step, all_tries in by_step.items()}


def _best(all_tries: list[Try]) -> Try:
    successful = [attempt for attempt in all_tries if attempt.ok]
    return successful[-1] if successful else max(reversed(all_tries), key=lambda attempt: len(attempt.records))
