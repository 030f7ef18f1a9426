"""Compile the Triton kernels of all ops into a cache folder to take along to a machine with a GPU.

`python tools/fill_triton_cache.py --out DIR [--target sm_90]`, by a Python with that machine's Triton (`make
target-env` has that of the first one). The calls of the parity cases, of the GPU bench's jobs and of its checks
are compiled by Triton's own launch path (`fake_triton_driver.py`), so the cache's keys are those that Triton asks for
on that machine. The binary and the metadata of each kernel are kept; there, `TRITON_CACHE_DIR` names the folder, and
`TRITON_DEFAULT_FP_FUSION=1` must be set, which is part of the keys. Other processes then make the same calls from a
copy of the folder at another path, and must compile nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("bfloat16", "float16", "float32")
KEPT = (".cubin", ".json")


# ---------------------------------------------------------------- in a process of one op and dtype


def inputs_of(op: str, dtype: str) -> Iterator[Mapping[str, Any]]:
    """Inputs of the parity cases, of the bench's jobs (with as few rows as make long ones split), and of its checks."""
    import torch
    from interformer_bench import gpu_jobs
    from interformer_bench.check_context import CheckContext
    from interformer_bench.gpu_place import Place

    from interformer_kernels import testing
    from interformer_kernels._launch import splits

    kind = getattr(torch, dtype)
    for case in testing.cases(op):
        yield testing.make_inputs(case, kind)
    for job in gpu_jobs.jobs():
        if job.shape is not None and job.shape.op == op and job.dtype == dtype:
            rows = 1
            while sum(job.shape.distribution.lengths(rows)) <= splits.SPLIT_KV:
                rows *= 2
            yield dataclasses.replace(job.shape, rows=rows).inputs(kind)
    context = CheckContext.of(Place("cpu", tiny=True), op, "triton")
    for sizes in ({}, {"kv_heads": 2}, {"kv_heads": 2, "gate": "full"}):
        yield testing.make_inputs(context.case((splits.SPLIT_KV, 3), **sizes), kind)


def compile_all(op: str, dtype: str, target: str) -> None:
    """Make every call, with its backward and without, so that its kernels are compiled into Triton's cache."""
    import fake_triton_driver
    import torch

    from interformer_kernels import testing

    fake_triton_driver.install(target)
    torch.set_num_threads(1)
    for inputs in inputs_of(op, dtype):
        testing.evaluate(lambda inputs=inputs: testing.call(op, inputs, "triton"), op, inputs)
        with torch.no_grad():
            testing.call(op, inputs, "triton")


# ---------------------------------------------------------------- all of them


def environment(cache: Path, scratch: Path) -> dict[str, str]:
    """Environment of the processes: this checkout, this cache."""
    bench = scratch / "interformer_bench"
    if not bench.exists():
        bench.symlink_to(ROOT / "bench")
    paths = [str(ROOT), str(ROOT / "python"), str(scratch), os.environ.get("PYTHONPATH", "")]
    variables = {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return {**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, **variables}


def fill(cache: Path, target: str, calls: Sequence[tuple[str, str]], jobs: int) -> None:
    """Compile these ops and dtypes, `jobs` processes at once. Raises CalledProcessError where one of them fails."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        env = environment(cache, Path(scratch))
        common = [sys.executable, __file__, "--out", str(cache), "--target", target]
        commands = [[*common, "--only", *call] for call in calls]
        list(pool.map(lambda command: subprocess.run(command, check=True, env=env), commands))


def prune(cache: Path) -> tuple[int, int]:
    """Keep only the files that another process needs; returns the number of kernels, and of bytes."""
    for file in [file for file in cache.rglob("*") if file.is_file() and file.suffix not in KEPT]:
        file.unlink()
    files = [file for file in cache.rglob("*") if file.is_file()]
    for folder in [folder for folder in cache.iterdir() if not any(folder.iterdir())]:
        folder.rmdir()
    return sum(file.suffix == ".cubin" for file in files), sum(file.stat().st_size for file in files)


def compiled_again(cache: Path, target: str, calls: Sequence[tuple[str, str]], jobs: int) -> int:
    """Number of kernels that the same calls compile again with a copy of the cache at another path."""
    with tempfile.TemporaryDirectory() as elsewhere:
        copy = Path(elsewhere) / "copy"
        shutil.copytree(cache, copy)
        before = {file.name for file in copy.iterdir()}
        fill(copy, target, calls, jobs)
        return sum(any(folder.glob("*.cubin")) for folder in copy.iterdir() if folder.name not in before)


def known_ops() -> Sequence[str]:
    """The ops of this checkout."""
    sys.path.insert(0, str(ROOT))
    from interformer_kernels import testing

    return testing.OPS


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the cache, check it, and report its contents; returns 1 where it is incomplete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the cache folder; what it holds already is kept")
    parser.add_argument("--target", choices=("sm_80", "sm_90", "sm_100"), default="sm_90")
    parser.add_argument("--op", action="append", help="may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile at once")
    parser.add_argument("--only", nargs=2, metavar=("OP", "DTYPE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.only:
        compile_all(*chosen.only, chosen.target)
        return 0
    ops = known_ops()
    for op in set(chosen.op or ()) - set(ops):
        parser.error(f"--op must be one of {', '.join(ops)}, found {op!r}")
    calls = list(itertools.product(chosen.op or ops, chosen.dtype or DTYPES))
    chosen.out.mkdir(parents=True, exist_ok=True)
    try:
        fill(chosen.out.resolve(), chosen.target, calls, chosen.jobs)
        kernels, size = prune(chosen.out)
        recompiled = compiled_again(chosen.out, chosen.target, calls, chosen.jobs)
    except subprocess.CalledProcessError as error:
        print(f"fill_triton_cache: {' '.join(map(str, error.cmd[-2:]))} failed; see above", file=sys.stderr)
        return 1
    print(
        f"{kernels} kernels for {chosen.target}, {size / 1e6:.1f} MB; {recompiled} compiled again from a copy elsewhere"
    )
    return 1 if recompiled or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
