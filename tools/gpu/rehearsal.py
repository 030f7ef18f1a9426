"""`make gpu-rehearsal`: the whole report on this machine, as it might go on another one, and whether it held.

The CPU's kernels stand in for the GPU's, on tiny sizes. In between are steps that go wrong in every way that was
thought of (`planted.py`); there is no git; the report is killed in the middle, its results lose the end of a line, and
it is resumed. Its profiler and sanitizers are stand-ins that run what they are given.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu import guard, plan, planted, results, table
from gpu.command import carry_out
from gpu.plan import Plan
from gpu.results import ROOT, Try
from gpu.run import LOG, Report, Stage

OUT = ROOT / "build" / "gpu-rehearsal"
SECONDS = 240.0  # of each run of the report; a slow machine must not fail
_KILLED_AT = "planted-hangs"
# Steps of the true plan: one of every kind.
_CHOSEN = (
    *("ceilings", "smoke-cuda", "checks1.apply_rotary-*", "parity-triton-personalized_ffn-*"),
    *("parity-cuda-apply_rotary-*", "first-triton", "pma-104-bf16", "ncu-triton", "memcheck-triton", "racecheck-cuda"),
)  # fmt: skip
_ALWAYS = ("machine", "backends", "jobs", "write")
_FILES = {results.FILE, LOG, "cpu.json", "cpu.md", "triton.ncu-rep"}
_MOST_BYTES = 16 << 20
# A profiler and a sanitizer that only run their program; the profiler tells of one kernel.
_STAND_IN = f"""#!{sys.executable}
import subprocess, sys
words = sys.argv[1:]
if "--import" in words:
    print('==PROF== told\\n"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"')
    print('"0","attention_forward","GPU Speed Of Light Throughput","Duration","us","12.5"')
    sys.exit()
if "--export" in words:
    open(words[words.index("--export") + 1], "w").write("a profile")
sys.exit(subprocess.call(words[words.index(sys.executable):]))
"""


@dataclasses.dataclass(frozen=True)
class Rehearsed(Plan):
    """The true plan's stages, some steps of each, and planted ones between them."""

    patience: float = 2.0  # seconds of a planted step that hangs

    def stages(self, part: int | None) -> list[Stage]:
        """The first planted steps alone, the others side by side, as parity is."""
        chosen = [self._some(stage) for stage in super().stages(part)]
        wrong = [planted.step(name, self.file, self.patience) for name in planted.PROGRAMS]
        half = len(chosen) // 2
        return [*chosen[:half], Stage(wrong[:4], SECONDS), *chosen[half:], Stage(wrong[4:], SECONDS, workers=4)]

    def _some(self, stage: Stage) -> Stage:
        steps = [step for step in stage.steps if any(fnmatch.fnmatchcase(step.name, one) for one in _CHOSEN)]
        return dataclasses.replace(stage, steps=steps)


def report(folder: Path, patience: float) -> int:
    """The report itself, in a process that may be killed."""
    stand_in = folder.parent / "tool"
    made = Report(folder, SECONDS)
    made.environment = plan.environment(os.environ)
    tools = {**plan.tools(), "ncu": str(stand_in), "compute-sanitizer": str(stand_in)}
    with made.opened():
        return carry_out(made, Rehearsed(made.file, device="cpu", tools=tools, patience=patience), None)


# ---------------------------------------------------------------- the rehearsal


def rehearse(folder: Path) -> Iterator[str]:
    """Kill a report, resume it, and look at what there is: every way in which it does not hold."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out, tool = folder / "out", folder / "tool"
    tool.write_text(_STAND_IN)
    tool.chmod(0o755)
    start = time.monotonic()
    killed = _started(out, 10 * SECONDS)
    yield from _kill(killed, out / results.FILE)
    yield from _nothing_runs(out, "after the kill")
    with open(out / results.FILE, "ab") as file:
        file.write(b'{"kind": "bench", "step": "cut o')
    resumed = _started(out, planted.PATIENCE)
    said, _ = resumed.communicate(timeout=3 * SECONDS)
    print(said)
    print(f"the rehearsal took {time.monotonic() - start:.0f} s")
    yield from _nothing_runs(out, "after the end")
    if resumed.returncode != 1:
        yield f"the report with failures ended with status {resumed.returncode}, not 1"
    yield from _looked_at(out, said)


def _started(out: Path, patience: float) -> subprocess.Popen[str]:
    """A report in a process, on a machine without git."""
    environment = {**os.environ, "PATH": str(out.parent), "PYTHONPATH": str(ROOT / "tools")}
    command = [sys.executable, "-m", "gpu.rehearsal", "--report", str(out), "--patience", str(patience)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def _kill(killed: subprocess.Popen[str], file: Path) -> Iterator[str]:
    """As soon as the step begins."""
    end = time.monotonic() + SECONDS
    while not any(one["kind"] == "begin" and one["step"] == _KILLED_AT for one in results.read(file)[0]):
        if killed.poll() is not None or time.monotonic() > end:
            yield f"the first report never came to {_KILLED_AT}"
            break
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    print("".join(killed.communicate()[0]) + f"KILLED in {_KILLED_AT}, and resumed")


def _nothing_runs(out: Path, when: str) -> Iterator[str]:
    end = time.monotonic() + 20
    while set(guard.marked(f"{out.resolve()}//")):
        if time.monotonic() > end:
            yield f"{when} processes still run: {sorted(guard.marked(f'{out.resolve()}//'))}"
            return
        time.sleep(0.1)


def _looked_at(out: Path, said: str) -> Iterator[str]:
    """Whether everything is there, and nothing but what must."""
    found, damaged = results.read(out / results.FILE)
    tries = results.tries(found)
    yield from _statuses(tries)
    begun = [one["step"] for one in found if one["kind"] == "begin"]
    for name in ("machine", "ceilings", "planted-good"):
        if begun.count(name) != 1:
            yield f"{name} was done {begun.count(name)} times"
    if begun.count(_KILLED_AT) != 2:
        yield f"{_KILLED_AT} was begun {begun.count(_KILLED_AT)} times"
    if damaged < 6:
        yield f"{damaged} damaged lines were seen, of 6"
    reports = [one for one in found if one["kind"] == "report"]
    if [one["commit"] for one in reports] != ["unknown: git is not installed"] * 2:
        yield f"two reports without git were wanted, found {reports}"
    files = {file.name: file.stat().st_size for file in out.iterdir()}
    if set(files) != _FILES or max(files.values()) > _MOST_BYTES:
        yield f"wanted the files {sorted(_FILES)}, found {files}"
    last = said[said.rfind("\nCPU: ") :]
    if len(last) > table.MOST + 100 or "== FAILED" not in last or "planted-crashes" not in last:
        yield "the table is not the last thing said, or is too long, or lacks what failed"


def _statuses(tries: dict[str, Try]) -> Iterator[str]:
    wanted = {f"planted-{name}": status for name, (_, status) in planted.PROGRAMS.items()}
    for pattern in (*_ALWAYS, *_CHOSEN):
        names = [name for name in tries if fnmatch.fnmatchcase(name, pattern)]
        wanted |= dict.fromkeys(names, results.OK)
        if not names:
            yield f"there is no step {pattern}"
    for name, status in wanted.items():
        if name not in tries or tries[name].status != status:
            yield f"{name}: wanted {status}, found {tries.get(name)}"


def main(given: Sequence[str] | None = None) -> int:
    """1 where the report did not hold."""
    parser = argparse.ArgumentParser(prog="make gpu-rehearsal", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    parser.add_argument("--report", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--patience", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args(given)
    if chosen.report:
        return report(chosen.report, chosen.patience)
    problems = list(rehearse(chosen.out))
    for problem in problems:
        print(f"make gpu-rehearsal: {problem}", file=sys.stderr)
    print("the report held" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
