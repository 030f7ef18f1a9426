"""The parts of the report's steps that need torch: `python -m gpu.inside PART`, a process each.

Every result is a line of JSON at once. On the CPU (`--device cpu`, for rehearsals) its kernels stand in for those of
both backends.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpu import profiles
from gpu.plan import BACKENDS, BENCH, CHECKS, DTYPES
from interformer_kernels import _backend, testing
from interformer_kernels._cli.errors import guarded
from interformer_kernels._files import append_line
from interformer_kernels.testing import Case

# Calls of the determinism check, and those of them whose rows are computed alone as well.
_TWICE = "plain", "gate and residual", "v is k", "jagged queries", "halves", "gelu, bias, residual"
_ALONE = "plain", "halves", "gelu, bias, residual"
_MOST_DRAWS = 8


@dataclass(frozen=True)
class Place:
    """The device and the backend of a step, and where its results go: a file, and the step's name."""

    device: str
    backend: str
    file: Path | None = None
    step: str = ""

    def serving(self, op: str) -> str:
        """The backend that is called in the name of `backend`; on the CPU it may be interpreted or emulated."""
        if self.device == "cuda" or _backend.unsupported_reason(op, self.backend, self.device, torch.bfloat16) is None:
            return self.backend
        return "cpu" if _backend.native() else "reference"

    def unsupported_reason(self, op: str) -> str | None:
        """The reason why the backend cannot serve an op here, or None."""
        return _backend.unsupported_reason(op, self.serving(op), self.device, torch.bfloat16)

    def served(self) -> list[str]:
        """The ops that it serves."""
        return [op for op in testing.OPS if self.unsupported_reason(op) is None]

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def write(self, kind: str, **values: Any) -> None:
        """Append a result, and show it."""
        record = {"kind": kind, "step": self.step, "backend": self.backend, **values}
        print(record, flush=True)
        if self.file is not None:
            append_line(self.file, record)


# ---------------------------------------------------------------- the machine


def machine(place: Place) -> int:
    """Versions, and the device; 1 where there is none."""
    description: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip}
    description |= {name: _version(name) for name in ("triton", "numpy")}
    description |= {"python": platform.python_version(), "system": platform.platform(), "gpu": None}
    if place.device == "cpu":
        description |= {"gpu": "CPU", "memory": 0, "capability": None, "processors": 0}
    elif torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        capability = list(torch.cuda.get_device_capability())
        description |= {"gpu": device.name, "memory": device.total_memory, "capability": capability}
        description |= {"processors": device.multi_processor_count}
    place.write("machine", **description)
    return 0 if description["gpu"] else 1


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def backends(place: Place) -> int:
    """The ops that each backend serves, the reasons against the others, and the native module's build."""
    module = _backend.native()
    native = module.build_info() if module else _backend._load_native()[1]
    for name in BACKENDS:
        backend_place = replace(place, backend=name)
        backend_place.write(
            "backend", why_not={op: backend_place.unsupported_reason(op) for op in testing.OPS}, native=native
        )
    return 0


def jobs(place: Place) -> int:
    """The jobs of the bench and of the checks, in order of value."""
    for module in (BENCH, CHECKS):
        listing = io.StringIO()
        with contextlib.redirect_stdout(listing):
            importlib.import_module(module).main(["--list", *(["--compiled"] if module == BENCH else [])])
        for line in listing.getvalue().splitlines():
            place.write("job", program=module, job=json.loads(line))
    return 0


# ---------------------------------------------------------------- checks


def _small(op: str) -> Case:
    """A small call with every epilogue that the op has."""
    gate: dict[str, Any] = {"gate": "full", "residual": True} if op in testing.OPS[:3] else {}
    return Case(op, "small", rope=4 if op == "apply_rotary" else 0, **gate)


def _call(op: str, place: Place, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
    """Forward and backward of that call."""
    inputs = testing.make_inputs(_small(op), dtype, place.device)
    return functools.partial(testing.evaluate, lambda: testing.call(op, inputs, place.serving(op)), op, inputs)


def smoke(place: Place) -> int:
    """One call of every op in two dtypes against float64; 1 where one is wrong or raises."""
    wrong = 0
    for dtype in DTYPES[:2]:
        for op in place.served():
            problem, worst = None, None
            try:
                rows = testing.compare(
                    _small(op), place.serving(op), getattr(torch, dtype), place.device, most_draws=_MOST_DRAWS
                )
                worst = max((row.share for row in rows), default=None)
                problem = None if all(row.ok for row in rows) else "beyond the error budget"
            except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                problem = f"{type(error).__name__}: {error}"[:300]
            wrong += problem is not None
            place.write("smoke", op=op, dtype=dtype, share=worst, ok=problem is None, problem=problem)
    return 1 if wrong else 0


def first(place: Place) -> int:
    """Time the first call of every op, forward and backward, compiling included; and the second."""
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = empty
        for op in place.served():
            call, times = _call(op, place), []
            for _ in range(2):
                start = time.perf_counter()
                call()
                place.wait()
                times.append(time.perf_counter() - start)
            place.write("first", op=op, first=times[0], second=times[1])
    return 0


def small(place: Place) -> int:
    """Call every op once in two dtypes, for the sanitizers."""
    for dtype in DTYPES[:2]:
        for op in place.served():
            _call(op, place, getattr(torch, dtype))()
            place.wait()
    place.write("sanitized", ops=place.served())
    return 0


def determinism(place: Place) -> int:
    """Compare two runs of some cases in every dtype, and every row of a few by itself; 1 where bits differ."""
    wrong = 0
    for dtype in DTYPES:
        for op in place.served():
            for case in (case for case in testing.cases(op) if case.name in _TWICE):
                differing = list(_differing(op, case, getattr(torch, dtype), place))
                wrong += bool(differing)
                fields = {"op": op, "dtype": dtype, "case": case.name}
                place.write("determinism", **fields, ok=not differing, differing=differing)
    return 1 if wrong else 0


def _differing(op: str, case: Case, dtype: torch.dtype, place: Place) -> Iterator[str]:
    """Quantities whose bits are not the same the second time, or of a row alone."""

    def run(inputs: Any) -> dict[str, torch.Tensor]:
        return testing.evaluate(lambda: testing.call(op, inputs, place.serving(op)), op, inputs)

    inputs = testing.make_inputs(case, dtype, place.device)
    outputs, repeated = run(inputs), run(inputs)
    yield from (name for name, x in outputs.items() if not torch.equal(x, repeated[name]))
    for b in range(len(case.lengths) if case.name in _ALONE else 0):
        single = run(testing.alone(inputs, case.lengths, b))
        single.pop("dseeds", None)  # a sum over rows
        for name, x in single.items():
            if not torch.equal(x, testing.row_of(outputs[name], case.lengths, b)):
                yield f"{name} of row {b}"


# ---------------------------------------------------------------- profiles and tiles


def heavy(place: Place) -> int:
    """Run rows of 500 keys on average, forward and backward, for the profiler."""
    lengths = tuple(range(1, 1000, 2 if place.device == "cuda" else 200))
    case = Case("jagged_attention", "heavy", lengths=lengths, head_size=64, value_size=64)
    inputs = testing.make_inputs(case, torch.bfloat16, place.device)
    testing.evaluate(lambda: testing.call(case.op, inputs, place.serving(case.op)), case.op, inputs)
    place.wait()
    return 0


def ncu(place: Place, tool: str, target: Path) -> int:
    """Measurements of the heaviest kernels by Nsight Compute; 1 where there are none."""
    driver = [sys.executable, "-m", "gpu.inside", "heavy", "--backend", place.backend, "--device", place.device]
    output = ""
    for command in (profiles.profiling(tool, place.backend, target, driver), profiles.printing(tool, target)):
        completed = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        output = completed.stdout
        print(output[-4000:], flush=True)
    profile = profiles.metrics(output)
    for kernel, metrics in profile.items():
        place.write("profile", kernel=kernel, metrics=metrics)
    return 0 if profile else 1


def tune(place: Place, kernel: str) -> int:
    """Time the Triton kernels' tiles. None are kept: later calls on this machine use the same tiles as before."""
    from interformer_kernels._triton import _tune

    current_entry = [""]

    def measure(call: Callable[[], object]) -> float:
        milliseconds = _tune.seconds(call)
        place.write("tiles", entry=current_entry[0], milliseconds=milliseconds)
        return milliseconds

    def note_entry(line: str) -> None:
        current_entry[0] = line

    with torch.no_grad():
        best_tiles = _tune.tune("cuda", (kernel,), most_width=64, measure=measure, log=note_entry)
    for key, tiles in best_tiles.items():
        place.write("tuned", entry=key, tiles=list(tiles))
    return 0


# ---------------------------------------------------------------- the command

_PROGRAMS: dict[str, Callable[[Place], int]] = {
    "machine": machine,
    "backends": backends,
    "jobs": jobs,
    "smoke": smoke,
    "first": first,
    "small": small,
    "determinism": determinism,
    "heavy": heavy,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one part; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m gpu.inside", description=__doc__)
    parser.add_argument("what", choices=(*_PROGRAMS, "ncu", "tune"))
    parser.add_argument("--backend", choices=BACKENDS, default="triton")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--step", default="")
    parser.add_argument("--tool", default="ncu", help="of ncu: the program")
    parser.add_argument("--profile", type=Path, help="of ncu: the file that it writes")
    parser.add_argument("--kernel", help="of tune: an entry of the table of tiles")
    chosen = parser.parse_args(arguments)
    place = Place(chosen.device, chosen.backend, chosen.results, chosen.step)
    if chosen.what == "ncu":
        return ncu(place, chosen.tool, chosen.profile)
    return tune(place, chosen.kernel) if chosen.what == "tune" else _PROGRAMS[chosen.what](place)


if __name__ == "__main__":
    raise SystemExit(guarded(main))
