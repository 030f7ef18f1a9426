"""`make gpu-rehearsal`: the whole report on this machine, with the mishaps of another one, and a check of its results.

The CPU's kernels stand in for the GPU's, on tiny sizes. In between are planted steps that go wrong (`planted.py`);
there is no git; the report is killed in the middle, its results lose the end of a line, and it is resumed. Its profiler
and sanitizers are stand-ins that run the command that they are given.
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
SECONDS = 240.0  # for each run of the report; enough for a slow machine
_KILLED_AT = "planted-hangs"
# Steps of the true plan: one of every kind.
_CHOSEN = (
    *("ceilings", "smoke-cuda", "checks1.apply_rotary-*", "parity-triton-personalized_ffn-*"),
    *("parity-cuda-apply_rotary-*", "first-triton", "pma-104-bf16", "ncu-triton", "memcheck-triton", "racecheck-cuda"),
)  # fmt: skip
_ALWAYS = ("machine", "backends", "jobs", "write")
_FILES = {results.FILE, LOG, "cpu.json", "cpu.md", "triton.ncu-rep"}
_MOST_BYTES = 16 << 20
# A profiler and a sanitizer that only run their program; the profiler reports one kernel.
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
        steps = [step for step in stage.steps if any(fnmatch.fnmatchcase(step.name, pattern) for pattern in _CHOSEN)]
        return dataclasses.replace(stage, steps=steps)


def run_report(folder: Path, patience: float) -> int:
    """The report itself, in a process that may be killed."""
    stand_in = folder.parent / "tool"
    report = Report(folder, SECONDS)
    report.environment = plan.environment(os.environ)
    tools = {**plan.tools(), "ncu": str(stand_in), "compute-sanitizer": str(stand_in)}
    with report.opened():
        return carry_out(report, Rehearsed(report.file, device="cpu", tools=tools, patience=patience), None)


# ---------------------------------------------------------------- the rehearsal


def rehearse(folder: Path) -> Iterator[str]:
    """Kill a report, resume it and check its results; yields every problem."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out, tool = folder / "out", folder / "tool"
    tool.write_text(_STAND_IN)
    tool.chmod(0o755)
    start = time.monotonic()
    killed = _start_report(out, 10 * SECONDS)
    yield from _kill(killed, out / results.FILE)
    yield from _nothing_runs(out, "after the kill")
    with open(out / results.FILE, "ab") as file:
        file.write(b'{"kind": "bench", "step": "cut o')
    resumed = _start_report(out, planted.PATIENCE)
    output, _ = resumed.communicate(timeout=3 * SECONDS)
    print(output)
    print(f"the rehearsal took {time.monotonic() - start:.0f} s")
    yield from _nothing_runs(out, "after the end")
    if resumed.returncode != 1:
        yield f"the report with failures ended with status {resumed.returncode}, not 1"
    yield from _check_results(out, output)


def _start_report(out: Path, patience: float) -> subprocess.Popen[str]:
    """A report in a process, on a machine without git."""
    environment = {**os.environ, "PATH": str(out.parent), "PYTHONPATH": str(ROOT / "tools")}
    command = [sys.executable, "-m", "gpu.rehearsal", "--report", str(out), "--patience", str(patience)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def _kill(process: subprocess.Popen[str], file: Path) -> Iterator[str]:
    """Kill the report as soon as the step begins."""
    end = time.monotonic() + SECONDS
    while not any(record["kind"] == "begin" and record["step"] == _KILLED_AT for record in results.read(file)[0]):
        if process.poll() is not None or time.monotonic() > end:
            yield f"the first report never came to {_KILLED_AT}"
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    print("".join(process.communicate()[0]) + f"KILLED in {_KILLED_AT}, and resumed")


def _nothing_runs(out: Path, moment: str) -> Iterator[str]:
    end = time.monotonic() + 20
    while set(guard.marked(f"{out.resolve()}//")):
        if time.monotonic() > end:
            yield f"{moment} processes still run: {sorted(guard.marked(f'{out.resolve()}//'))}"
            return
        time.sleep(0.1)


def _check_results(out: Path, output: str) -> Iterator[str]:
    """Check that all results are there, and no files besides."""
    records, damaged = results.read(out / results.FILE)
    tries = results.tries(records)
    yield from _check_statuses(tries)
    begun = [record["step"] for record in records if record["kind"] == "begin"]
    for name in ("machine", "ceilings", "planted-good"):
        if begun.count(name) != 1:
            yield f"{name} was done {begun.count(name)} times"
    if begun.count(_KILLED_AT) != 2:
        yield f"{_KILLED_AT} was begun {begun.count(_KILLED_AT)} times"
    if damaged < 6:
        yield f"{damaged} damaged lines were seen, of 6"
    reports = [record for record in records if record["kind"] == "report"]
    if [record["commit"] for record in reports] != ["unknown: git is not installed"] * 2:
        yield f"two reports without git were wanted, found {reports}"
    files = {file.name: file.stat().st_size for file in out.iterdir()}
    if set(files) != _FILES or max(files.values()) > _MOST_BYTES:
        yield f"wanted the files {sorted(_FILES)}, found {files}"
    last = output[output.rfind("\nCPU: ") :]
    if len(last) > table.MOST + 100 or "== FAILED" not in last or "planted-crashes" not in last:
        yield "the table is not the last thing said, or is too long, or lacks what failed"


def _check_statuses(tries: dict[str, Try]) -> Iterator[str]:
    expected = {f"planted-{name}": status for name, (_, status) in planted.PROGRAMS.items()}
    for pattern in (*_ALWAYS, *_CHOSEN):
        names = [name for name in tries if fnmatch.fnmatchcase(name, pattern)]
        expected |= dict.fromkeys(names, results.OK)
        if not names:
            yield f"there is no step {pattern}"
    for name, status in expected.items():
        if name not in tries or tries[name].status != status:
            yield f"{name}: wanted {status}, found {tries.get(name)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rehearsal; 1 where the report did not hold."""
    parser = argparse.ArgumentParser(prog="make gpu-rehearsal", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    parser.add_argument("--report", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--patience", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.report:
        return run_report(chosen.report, chosen.patience)
    problems = list(rehearse(chosen.out))
    for problem in problems:
        print(f"make gpu-rehearsal: {problem}", file=sys.stderr)
    print("the report held" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
