"""`make gpu-report`: everything that only a GPU can show, in one command of less than ten minutes, without installing.

Stages, each in a process of its own with a limit of time; what one leaves stands, whatever becomes of the others:
the native module built in place, and for each backend of kernels: parity of every op in every dtype against float64,
first calls, two runs bit by bit, the sanitizer on small calls where it is installed, and the bench. Written:
bench/results/<gpu>.json and .md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "gpu-report"
DTYPES = ("float32", "bfloat16", "float16")
# Seconds that a stage may take, all backends together: less than ten minutes in all.
LIMITS = {"build": 150, "parity": 160, "first": 20, "determinism": 40, "sanitizer": 60, "bench": 160}
# Tools of compute-sanitizer; Triton orders its shared memory itself.
TOOLS = {"triton": ("memcheck",), "cuda": ("memcheck", "racecheck")}


def environment() -> dict[str, str]:
    """Of the stages: the checkout is what they import."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "TRITON_DEFAULT_FP_FUSION": "1"}


def stage(name: str, command: Sequence[str], limit: float) -> dict[str, Any]:
    """Run a command; its status, seconds, and the last of what it said, which is also kept whole in a log."""
    start = time.perf_counter()
    log = OUT / f"{name}.log"
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(), timeout=limit
            )
            status: int | str = done.returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    said = log.read_text(errors="replace").strip().splitlines()
    taken = time.perf_counter() - start
    print(f"[{taken:5.0f} s] {name}: {status}", flush=True)
    return {"status": status, "seconds": round(taken, 1), "last": said[-5:]}


# ---------------------------------------------------------------- the stages


def build() -> dict[str, Any]:
    """The native module, where its tools are installed; the report goes on without it."""
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if missing or importlib.util.find_spec("pybind11") is None:
        return {"status": f"not built: {', '.join(missing) or 'pybind11'} is not installed", "seconds": 0, "last": []}
    return stage("build", [sys.executable, "setup.py", "build_ext", "--inplace"], LIMITS["build"])


def served(backend: str, device: str = "cuda") -> list[str]:
    """The ops that a backend serves on this GPU."""
    import torch

    from interformer_kernels import _backend, testing

    return [op for op in testing.OPS if _backend.why_not(op, backend, device, torch.float32) is None]


def parity(backends: Sequence[str]) -> dict[str, Any]:
    """Every case of every op, one process for each op and dtype: most of the time goes into compiling."""
    end = time.perf_counter() + LIMITS["parity"]

    def one(op: str, dtype: str, backend: str) -> dict[str, Any]:
        name = f"parity-{backend}-{op}-{dtype}"
        command = [sys.executable, "-m", "interformer_kernels", "parity", "--device", "cuda", "--backend", backend]
        command += ["--op", op, "--dtype", dtype, "--most-draws", "16", "--json", str(OUT / f"{name}.json")]
        done = stage(name, command, max(1.0, end - time.perf_counter()))
        file = OUT / f"{name}.json"
        results = json.loads(file.read_text()) if file.exists() else []
        breaches = [r for r in results if not r["ok"]]
        return {**done, "compared": len(results), "breaches": breaches[:20]}

    jobs = [(op, dtype, backend) for backend in backends for op in served(backend) for dtype in DTYPES]
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        found = pool.map(lambda job: one(*job), jobs)
        return {f"{backend}, {op}, {dtype}": done for (op, dtype, backend), done in zip(jobs, found, strict=True)}


def determinism(backend: str, device: str = "cuda") -> int:
    """In a process of its own: two runs of some cases of every op in every dtype, and of every row of a few by itself;
    1 where their bits differ."""
    import torch

    from interformer_kernels import testing

    wrong = 0
    chosen = "plain", "gate and residual", "v is k", "jagged queries", "halves", "gelu, bias, residual"
    by_rows = "plain", "halves", "gelu, bias, residual"
    for op in served(backend, device):
        for case in (case for case in testing.cases(op) if case.name in chosen):
            for dtype in DTYPES:
                inputs = testing.make_inputs(case, getattr(torch, dtype), device)
                runs = [
                    testing.evaluate(lambda: testing.call(op, inputs, backend), op, inputs)  # noqa: B023
                    for _ in range(2)
                ]
                differing = [name for name, x in runs[0].items() if not torch.equal(x, runs[1][name])]
                for b in range(len(case.lengths) if case.name in by_rows else 0):
                    one = testing.alone(inputs, case.lengths, b)
                    single = testing.evaluate(lambda: testing.call(op, one, backend), op, one)  # noqa: B023
                    single.pop("dseeds", None)  # a sum over rows
                    same = {
                        name: torch.equal(x, testing.row_of(runs[0][name], case.lengths, b))
                        for name, x in single.items()
                    }
                    differing += [f"{name} of row {b}" for name, equal in same.items() if not equal]
                wrong += bool(differing)
                print(f"{op}, {case.name}, {dtype}: {'same bits' if not differing else f'DIFFERENT {differing}'}")
    return 1 if wrong else 0


def small_call(backend: str, device: str = "cuda") -> int:
    """In a process of its own, for first calls and the sanitizer: one gated call of every op, forward and backward."""
    import torch

    from interformer_kernels import testing

    for op in served(backend, device):
        gate = {"gate": "full", "residual": True} if op in testing.OPS[:3] else {}
        case = testing.Case(op, "small", rope=4 if op == "apply_rotary" else 0, **gate)
        inputs = testing.make_inputs(case, torch.bfloat16, device)
        start = time.perf_counter()
        testing.evaluate(lambda: testing.call(op, inputs, backend), op, inputs)  # noqa: B023
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{op}: {1e3 * (time.perf_counter() - start):.1f} ms, forward and backward, the first time")
    return 0


def bench(arguments: Sequence[str]) -> int:
    """In a process of its own: the bench, under the name it has where it is installed."""
    spec = importlib.util.spec_from_file_location(
        "interformer_bench", ROOT / "bench" / "__init__.py", submodule_search_locations=[str(ROOT / "bench")]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["interformer_bench"] = module
    spec.loader.exec_module(module)
    from interformer_bench import gpu

    return int(gpu.main(list(arguments)))


# ---------------------------------------------------------------- the report


def collect(data: Path | None) -> dict[str, Any]:
    """Run all stages."""
    import torch
    import triton

    said = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    device = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "gpu": device.name,
        "memory": device.total_memory,
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "python": platform.python_version(),
        "commit": said or "unknown",
        "build": build(),
    }
    backends = [name for name in TOOLS if served(name)]
    found["backends"] = backends
    found["parity"] = parity(backends)
    for name in backends:
        found |= stages_of(name, data, 1 / len(backends))
    return found


def stages_of(backend: str, data: Path | None, share: float) -> dict[str, Any]:
    """What follows parity, of one backend, in its share of the time."""
    again = [sys.executable, str(Path(__file__)), "--backend", backend, "--stage"]
    found = {f"first calls, {backend}": stage(f"first-{backend}", [*again, "small"], LIMITS["first"] * share)}
    found[f"determinism, {backend}"] = stage(
        f"determinism-{backend}", [*again, "determinism"], LIMITS["determinism"] * share
    )
    sanitizer = shutil.which("compute-sanitizer")
    for tool in TOOLS[backend]:
        limit = LIMITS["sanitizer"] * share / len(TOOLS[backend])
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "1", *again, "small"]
        missing = {"status": "compute-sanitizer is not installed", "seconds": 0, "last": []}
        found[f"{tool}, {backend}"] = stage(f"{tool}-{backend}", command, limit) if sanitizer else missing
    of_data = ["--data", str(data)] if data else []
    limit = LIMITS["bench"] * share
    command = [*again, "bench", "--", "--out", str(OUT / backend), "--backend", backend]
    command += ["--minutes", f"{(limit - 30) / 60:.2f}", *of_data]
    found[f"bench, {backend}"] = stage(f"bench-{backend}", command, limit)
    return found


def write(found: dict[str, Any]) -> list[Path]:
    """The stages, and the bench's own tables, as JSON and Markdown."""
    from interformer_kernels._files import to_json, write_text

    name = re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower()).strip("-")
    folder = ROOT / "bench" / "results"
    measured = {backend: OUT / backend / "bench.json" for backend in found["backends"]}
    tables = {backend: json.loads(file.read_text()) if file.exists() else None for backend, file in measured.items()}
    whole = {**found, "measured": tables}
    write_text(folder / f"{name}.json", to_json(whole))
    lines = [f"# {found['gpu']}", "", f"torch {found['torch']}, Triton {found['triton']}, CUDA or HIP {found['cuda']}, "
             f"Python {found['python']}, commit {found['commit']}. Backends: {', '.join(found['backends']) or 'none'}.",
             "", "| stage | status | seconds |", "| --- | --- | --- |"]  # fmt: skip
    stages = {key: one for key, one in found.items() if isinstance(one, dict) and "status" in one}
    stages |= {f"parity, {key}": one for key, one in found["parity"].items()}
    for key, one in stages.items():
        compared = f"; {one['compared']} compared, {len(one['breaches'])} breaches" if "compared" in one else ""
        lines.append(f"| {key} | {one['status']}{compared} | {one['seconds']} |")
    for backend in found["backends"]:
        said = found.get(f"first calls, {backend}", {}).get("last", [])
        lines += ["", f"First calls of {backend}, compiling included:", "", *(f"- {line}" for line in said)]
        table = OUT / backend / "bench.md"
        lines += ["", f"## Bench of {backend}", ""]
        lines.append(table.read_text() if table.exists() else "The bench left no tables.")
    write_text(folder / f"{name}.md", "\n".join(lines) + "\n")
    return [folder / f"{name}.json", folder / f"{name}.md"]


def main() -> int:
    """All stages, or (for itself) one of them; 1 where something went wrong."""
    parser = argparse.ArgumentParser(prog="make gpu-report", description=__doc__)
    parser.add_argument("--data", type=Path, help="directory with the length files")
    parser.add_argument("--stage", choices=("determinism", "small", "bench"), help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="triton", help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    try:
        import torch
    except ImportError as error:
        print(f"make gpu-report: needs torch: {error}", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("make gpu-report: needs a GPU that torch can use, found none", file=sys.stderr)
        return 1
    if chosen.stage == "bench":
        return bench(chosen.rest)
    if chosen.stage is not None:
        return {"determinism": determinism, "small": small_call}[chosen.stage](chosen.backend)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    found = collect(chosen.data)
    print("written:", *(file.relative_to(ROOT) for file in write(found)))
    stages = [one for one in (*found.values(), *found["parity"].values()) if isinstance(one, dict) and "status" in one]
    return 0 if all(one["status"] == 0 for one in stages) else 1


if __name__ == "__main__":
    raise SystemExit(main())
