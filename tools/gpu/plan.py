"""The steps of a report in order of value, for a machine with one GPU that is available for minutes.

Part 1 (330 s) checks the results and measures the shapes that matter. Part 2 (300 s, best at once after it) repeats the
steps that failed or were cut off, runs profiler and sanitizers, measures the other shapes, and last the runners that
take minutes to compile.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu.results import ROOT, Try
from gpu.run import Stage, Step

SECONDS = {1: 330.0, 2: 300.0, None: 590.0}
BACKENDS = ("triton", "cuda")
BENCH, CHECKS = "interformer_bench.gpu", "interformer_bench.gpu_checks"
DTYPES = ("bfloat16", "float32", "float16")
# Parts that parity of an op is cut into, a process each: a Triton process compiles some 60 kernels at most.
PARITY_PARTS = {
    "triton": {"jagged_attention": 12, "pma_pooling": 4, "gated_cross_attention": 4},
    "cuda": {"jagged_attention": 4},
}
# Racecheck is about shared memory, whose use Triton orders itself.
_SANITIZERS = (("triton", "memcheck"), ("cuda", "memcheck"), ("cuda", "racecheck"))
_TUNED = ("forward", "grad_keys", "short")
_TOOLS = ("git", "gcc", "nvcc", "cmake", "ninja", "ncu", "compute-sanitizer", "nvidia-smi")
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/nsight-compute/*")
_ALONE = ("beyond-int32",)  # checks that take half of the GPU's memory
# Shares of a report's time that the first parity leaves for the bench, its retrial in part 2 for the rest, and the
# other shapes for what is last.
_FOR_BENCH, _FOR_PART_2, _FOR_LAST = 0.35, 0.5, 0.1
_FOR_TABLES = 0.03


def tools() -> dict[str, str | None]:
    """Paths of the tools that steps may use; None where a tool is not installed."""
    return {name: _find(name) for name in _TOOLS}


def _find(name: str) -> str | None:
    places = (path for pattern in _PLACES for path in sorted(glob.glob(f"{pattern}/{name}"), reverse=True))
    return shutil.which(name) or next((path for path in places if os.access(path, os.X_OK)), None)


@dataclass(frozen=True)
class Plan:
    """The settings of all steps.

    Attributes:
        file: the results.
        device: "cuda"; or "cpu", for rehearsals, where everything is tiny, too.
        tries: the steps `machine`, `backends` and `jobs` with their results.
    """

    file: Path
    device: str = "cuda"
    python: str = sys.executable
    data: Path | None = None
    tools: Mapping[str, str | None] = field(default_factory=tools)
    tries: Mapping[str, Try] = field(default_factory=dict)

    @property
    def tiny(self) -> bool:
        """Whether this is a rehearsal."""
        return self.device == "cpu"

    # ------------------------------------------------------------ results of the first steps

    def _records(self, step: str, kind: str) -> list[dict[str, Any]]:
        attempt = self.tries.get(step)
        return [record for record in attempt.records if record["kind"] == kind] if attempt else []

    @property
    def machine(self) -> dict[str, Any]:
        """Versions, and the device."""
        return next(iter(self._records("machine", "machine")), {})

    def _unsupported_reasons(self, backend: str) -> Mapping[str, str | None]:
        """Reasons why ops are not served, by op; empty where they are unknown."""
        records = self._records("backends", "backend")
        return next((record["why_not"] for record in records if record.get("backend") == backend), {})

    def _ops(self) -> list[str]:
        """The ops that the backends were asked about; where that failed, those whose parity takes longest."""
        asked = (op for record in self._records("backends", "backend") for op in record["why_not"])
        return list(dict.fromkeys(asked)) or list(PARITY_PARTS["triton"])

    def _serves(self, backend: str, op: str) -> bool:
        return self._unsupported_reasons(backend).get(op) is None

    def _missing(self, backend: str) -> str | None:
        """The reason why a backend serves nothing here, if it serves nothing."""
        reasons = self._unsupported_reasons(backend)
        return next(iter(reasons.values())) if reasons and None not in reasons.values() else None

    def _jobs(self, program: str, part: int, compiled: bool = False) -> Iterator[dict[str, Any]]:
        for record in self._records("jobs", "job"):
            job = record["job"]
            whole = isinstance(job.get("name"), str) and isinstance(job.get("seconds"), (int, float))
            key = program, part, compiled
            if whole and (record["program"], job.get("part"), job.get("compiled", False)) == key:
                yield job

    # ------------------------------------------------------------ steps

    def _inside(self, name: str, limit: float, *arguments: str, backend: str = "", **options: Any) -> Step:
        """A step of `inside.py`."""
        command = [self.python, "-m", "gpu.inside", *arguments, "--device", self.device]
        command += ["--results", str(self.file), "--step", name, *(["--backend", backend] if backend else [])]
        return Step(
            name, tuple(command), limit, **({"missing": self._missing(backend)} | options if backend else options)
        )

    def look(self) -> Stage:
        """Versions, and whether there is a GPU."""
        return Stage([self._inside("machine", 60, "machine")], 60)

    def ask(self) -> Stage:
        """Ask which backend serves which op, and which jobs there are."""
        return Stage([self._inside("backends", 60, "backends"), self._inside("jobs", 60, "jobs")], 60, 2)

    def write_down(self) -> Stage:
        """Write bench/results from the results, in a process, since the bench's tables need torch."""
        command = [self.python, str(ROOT / "tools" / "gpu_report.py"), "--table", str(self.file.parent)]
        command += ["--into", str(self.file.parent)] if self.tiny else []
        return Stage([Step("write", tuple(command), 60, finds=False)], 60)

    def build(self) -> Stage:
        """Build the native module for this device alone, where it is missing and can be built."""
        native = next((record.get("native") for record in self._records("backends", "backend")), None)
        if not isinstance(native, str) or self.tiny:
            return Stage([], 0)
        needed = [name for name in ("gcc", "cmake", "ninja") if self.tools.get(name) is None]
        needed += [name for name in ("pybind11", "setuptools") if importlib.util.find_spec(name) is None]
        major, minor = self.machine.get("capability") or (9, 0)
        environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}{'a' if major == 9 else ''}"}
        command = (self.python, "setup.py", "build_ext", "--inplace")
        missing = f"{', '.join(needed)} (to build the native module: {native})" if needed else None
        return Stage([Step("build", command, 150, False, environment, missing)], 150, leave=_FOR_BENCH)

    def _ceilings(self) -> Iterator[Step]:
        return (step for step in self._bench(1) if step.name == "ceilings")

    def _bench(self, part: int, compiled: bool = False) -> Iterator[Step]:
        """Jobs of the bench: each measures both backends and their peers in a process of its own."""
        for job in self._jobs(BENCH, part, compiled):
            yield self._job(BENCH, job["name"], [job])

    def _checks(self, part: int, alone: bool = False) -> Iterator[Step]:
        """The checks that only a GPU can answer: those of an op by a backend in a process of their own, side by side.

        Checks that must be `alone` on the GPU would take long to start one by one: a backend has a process for all ops.
        """
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for job in self._jobs(CHECKS, part):
            kind, _, op = job["name"].partition(".")
            if (kind in _ALONE) == alone:
                groups.setdefault(kind if alone else f"checks{part}.{op}", []).append(job)
        for name, jobs in groups.items():
            for backend in BACKENDS:
                yield self._job(CHECKS, f"{name}-{backend}", jobs, backend)

    def _job(self, program: str, name: str, jobs: Sequence[Mapping[str, Any]], backend: str | None = None) -> Step:
        """Some of the jobs that a program of the bench lists, in one process."""
        serving = [candidate for candidate in BACKENDS if self._missing(candidate) is None]
        options = [("--only", job["name"]) for job in jobs]
        options += [("--backend", candidate) for candidate in ([backend] if backend else serving)]
        options += [("--results", str(self.file)), ("--device", self.device)]
        command = [self.python, "-m", program, *(word for pair in options for word in pair)]
        command += ["--tiny"] if self.tiny else ["--data", str(self.data)] if self.data and backend is None else []
        limit = 20 + 3 * sum(job["seconds"] for job in jobs)
        missing = self._missing(backend) if backend else None
        records = tuple(job["name"] for job in jobs)
        # Checks run side by side: a pool of compilers for each would be a crowd.
        one_thread = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"} if backend else {}
        return Step(
            name, tuple(command), limit, environment=one_thread, missing=missing, records=records, backend=backend
        )

    def _parity(self) -> Iterator[Step]:
        """Every case against float64, the most used dtypes and the long jobs first."""
        for dtype in DTYPES[:1] if self.tiny else DTYPES:
            for op in self._ops():
                for backend in BACKENDS:
                    if self._serves(backend, op):
                        yield from self._parity_of(backend, op, dtype)

    def _parity_of(self, backend: str, op: str, dtype: str) -> Iterator[Step]:
        parts = 8 if self.tiny else PARITY_PARTS[backend].get(op, 1)
        for part in range(1, 2 if self.tiny else parts + 1):
            name = f"parity-{backend}-{op}-{dtype}-{part}of{parts}"
            command = [self.python, "-m", "interformer_kernels", "parity", "--device", self.device]
            command += ["--backend", "cpu" if self.tiny else backend, "--op", op, "--dtype", dtype]
            command += ["--most-draws", "1" if self.tiny else "16", "--part", f"{part}/{parts}"]
            one_thread = {"OMP_NUM_THREADS": "1"}
            yield Step(name, (*command, "--lines", str(self.file), "--step", name), 90, environment=one_thread)

    def _of_backends(self, program: str, limit: float) -> list[Step]:
        return [self._inside(f"{program}-{name}", limit, program, backend=name) for name in BACKENDS]

    def _profiles(self) -> Iterator[Step]:
        tool = self.tools.get("ncu")
        for backend in BACKENDS:
            target = self.file.with_name(f"{backend}.ncu-rep")
            missing = self._missing(backend) or (None if tool else "ncu is not installed")
            arguments = ("--tool", str(tool), "--profile", str(target))
            yield self._inside(f"ncu-{backend}", 60, "ncu", *arguments, backend=backend, missing=missing)

    def _sanitizers(self) -> Iterator[Step]:
        """Small calls; without PyTorch's cache of memory, inside which nothing is out of bounds."""
        tool = self.tools.get("compute-sanitizer")
        for backend, name in _SANITIZERS:
            step = self._inside(f"{name}-{backend}", 100, "small", backend=backend)
            command = (str(tool), "--tool", name, "--error-exitcode", "1", *step.command)
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name == "memcheck" else {}
            missing = step.missing or (None if tool else "compute-sanitizer is not installed")
            yield Step(step.name, command, step.limit, environment=environment, missing=missing)

    def _tunes(self) -> Iterator[Step]:
        for kernel in () if self.tiny else _TUNED:
            yield self._inside(f"tune-{kernel}", 60, "tune", "--kernel", kernel, backend="triton")

    # ------------------------------------------------------------ the parts

    def stages(self, part: int | None) -> list[Stage]:
        """The stages of part 1 or 2, or of both; the runner skips steps that ended well before."""
        first_stages = () if part == 2 else self.part_1()
        second_stages = () if part == 1 else self.part_2()
        return _once([*first_stages, *second_stages])

    def part_1(self) -> Iterator[Stage]:
        """Checks of results, and times of the shapes that matter."""
        cpus = os.cpu_count() or 1
        yield Stage(list(self._ceilings()), 40, leave=_FOR_BENCH)
        yield Stage(self._of_backends("smoke", 60), 60, 2, _FOR_BENCH)
        yield Stage(list(self._checks(1)), 80, cpus, _FOR_BENCH)
        yield Stage(list(self._parity()), 110, cpus, _FOR_BENCH)
        yield Stage(self._of_backends("first", 25), 40, leave=_FOR_BENCH)
        yield Stage(list(self._bench(1)), 3600)

    def part_2(self) -> Iterator[Stage]:
        """The rest of part 1, then profiler and sanitizers, then the other shapes."""
        cpus = os.cpu_count() or 1
        yield Stage(list(self._parity()), 110, cpus, _FOR_PART_2)
        yield Stage([*self._checks(1), *self._checks(2)], 80, cpus, _FOR_PART_2)
        yield Stage(self._of_backends("determinism", 60), 60, 2, _FOR_PART_2)
        yield Stage(list(self._profiles()), 70, leave=0.4)
        yield Stage(list(self._sanitizers()), 100, len(_SANITIZERS), 0.25)
        yield Stage(list(self._checks(2, alone=True)), 60, leave=0.2)
        yield Stage([*self._bench(1), *self._bench(2)], 3600, leave=_FOR_LAST)
        yield Stage(list(self._tunes()), 120)
        yield Stage(list(self._bench(2, compiled=True)), 3600)


def _once(stages: Iterable[Stage]) -> list[Stage]:
    """The stages without steps that an earlier one has: within one report nothing is tried twice."""
    seen: set[str] = set()
    unique = []
    for stage in stages:
        steps = [step for step in stage.steps if step.name not in seen]
        seen |= {step.name for step in steps}
        unique.append(replace(stage, steps=steps, leave=max(stage.leave, _FOR_TABLES)))
    return unique


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """The environment of the steps: they import the checkout, and the bench under its installed name."""
    link = ROOT / "build" / "gpu-path" / "interformer_bench"
    link.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(Path("..") / ".." / "bench")
    paths = [ROOT, ROOT / "python", ROOT / "tools", link.parent, *filter(None, [base.get("PYTHONPATH")])]
    settings = {"PYTHONUNBUFFERED": "1", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_WAIT_POLICY": "passive"}
    return {**base, **settings, "PYTHONPATH": os.pathsep.join(map(str, paths))}
