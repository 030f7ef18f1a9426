"""Peak memory of one call beyond its inputs and outputs, as the operating system counts it.

Every (shape, runner) gets a child process, so that no memory of another one is left over. The child makes the inputs,
calls the runner once on two short rows (which loads libraries, threads and kernels), asks Linux to reset the peak
(`/proc/self/clear_refs`), calls once, and reads the peak (`VmHWM`). This counts allocations of PyTorch and of the C++
kernels alike. By the child's environment, blocks of 64 KiB and more return to the system when they are freed, so that
no later block can hide in them. The output and the gradients are subtracted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from interformer_bench import shapes, workloads
from interformer_bench.grid import Shape
from interformer_bench.ops.table import TABLE
from interformer_bench.peers import OURS
from interformer_bench.peers.registry import candidates
from interformer_bench.progress import Progress
from interformer_bench.run import PASSES, runner
from interformer_bench.timing import TimedCall
from interformer_bench.workloads import Sizes
from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": str(1 << 16),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
# The peer that our memory is compared with.
YARDSTICK = {name: op.memory_peers[0] for name, op in TABLE.items()}


@dataclass(frozen=True)
class Peak:
    """Bytes beyond inputs and outputs at the peak of one call; `problem` says why they are unknown.

    The fields are the keys of result files; `law` is the name of the distribution of row lengths.
    """

    op: str
    law: str
    sizes: str
    direction: str
    runner: str
    extra: int | None
    problem: str | None = None


def unsupported_reason() -> str | None:
    """The reason why peaks cannot be read on this system; None where they can."""
    return None if _CLEAR.exists() else "peak memory is read from Linux's /proc"


def growth(call: TimedCall) -> tuple[int, object]:
    """The growth of this process's memory at the peak of a call, in bytes, and the call's result."""
    _CLEAR.write_text("5")
    before = _kilobytes("VmRSS")
    result = call()
    return 1024 * (_kilobytes("VmHWM") - before), result


def in_child(module: str, arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The lines that `python -m interformer_bench.<module>` prints in a process whose memory can be read, and why it
    failed; None where it did not."""
    command = [sys.executable, "-m", f"interformer_bench.{module}", *arguments]
    completed = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    if completed.returncode:
        reason = (completed.stderr.strip().splitlines() or [f"status {completed.returncode}"])[-1]
        return [], reason[:200]
    return completed.stdout.splitlines(), None


def of_child(module: str, arguments: Sequence[str]) -> str:
    """The last line of such a process, as the cell of a table."""
    if unsupported_reason():
        return "unknown"
    lines, problem = in_child(module, arguments)
    return f"failed: {problem}" if problem else lines[-1]


def _kilobytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def peaks(chosen: Sequence[Shape], data: Path | None, threads: int, progress: Progress) -> Iterator[Peak]:
    """The peaks of the shapes that are marked for it, in both passes."""
    marked = [shape for shape in chosen if shape.memory]
    jobs = [(shape, name) for shape in marked for name in (OURS, *TABLE[shape.op].memory_peers)]
    progress.begin("memory", len(jobs))
    for shape, name in jobs:
        progress.step(f"{shape.op}, {shape.distribution.name}: {name}")
        yield from _in_child(shape, name, data, threads)


def _in_child(shape: Shape, name: str, data: Path | None, threads: int) -> list[Peak]:
    labels = shape.op, shape.distribution.name, str(shape.sizes)
    request = {
        "shape": {"op": shape.op, "rows": shape.rows},
        "distribution": shape.distribution.name,
        "data": str(data) if data else None,
        "sizes": asdict(shape.sizes),
        "runner": name,
        "threads": threads,
    }
    lines, problem = in_child("memory", [json.dumps(request)])
    if problem:
        return [Peak(*labels, direction, name, None, problem) for direction in PASSES]
    extra_bytes = json.loads(lines[-1])
    return [Peak(*labels, direction, name, extra_bytes[direction]) for direction in PASSES]


def extra(shape: Shape, name: str, direction: str) -> int:
    """Bytes beyond inputs and outputs at the peak of one float32 call, measured in this process."""
    peer = candidates(shape.op)[name]
    tiny, arguments = (workloads.inputs(shape.op, n, shape.sizes, torch.float32) for n in ((3, 2), shape.lengths()))
    runner(shape.op, peer, tiny, direction)()
    grown, result = growth(runner(shape.op, peer, arguments, direction))
    outputs = result.values() if isinstance(result, dict) else (result,)
    output_bytes = {x.data_ptr(): x.untyped_storage().nbytes() for x in outputs if isinstance(x, Tensor)}
    return max(0, grown - sum(output_bytes.values()))


def main(request: str) -> None:
    """The child process: print the bytes of both passes as JSON."""
    job = json.loads(request)
    torch.set_num_threads(job["threads"])
    distribution = shapes.length_distributions(job["data"])[job["distribution"]]
    shape = Shape(**job["shape"], distribution=distribution, sizes=Sizes(**job["sizes"]))
    print(json.dumps({direction: extra(shape, job["runner"], direction) for direction in PASSES}))


if __name__ == "__main__":
    main(sys.argv[1])
