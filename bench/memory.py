"""Peak memory of one call beyond its inputs and outputs, as the operating system counts it.

A child process per (shape, runner), so that nothing is left over from another one. It makes the inputs, calls the
runner once on two short rows (libraries, threads and kernels are loaded then), asks Linux to forget the peak
(`/proc/self/clear_refs`), calls once, and reads the peak (`VmHWM`). That counts what PyTorch allocates and what the C++
kernels allocate alike. Blocks of 64 KiB and more go back to the system when they are freed (the child's environment),
so that a later block cannot hide in them. The output and the gradients are outputs: they are taken off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from interformer_bench import shapes, workloads
from interformer_bench.grid import Shape
from interformer_bench.peers import OURS, candidates
from interformer_bench.progress import Progress
from interformer_bench.run import PASSES, runner
from interformer_bench.workloads import Sizes
from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
# Which peer's memory ours is held against, and who else is measured.
YARDSTICK = {
    "jagged_attention": "padded SDPA",
    "pma_pooling": "padded SDPA",
    "pma_folded": "projected, padded SDPA",
    "gated_cross_attention": "padded SDPA",
    "apply_rotary": "padded",
    "personalized_ffn": "padded bmm",
}
_OTHERS = {
    "jagged_attention": ("per-row SDPA",),
    "pma_pooling": ("per-row SDPA", "index-add"),
    "pma_folded": ("folded, padded SDPA", "folded, row by row"),
    "gated_cross_attention": ("per-row SDPA",),
    "apply_rotary": ("two halves",),
    "personalized_ffn": ("row by row",),
}


@dataclass(frozen=True)
class Peak:
    """Bytes beyond inputs and outputs at the peak of one call; `problem` says why they are not known."""

    op: str
    law: str
    sizes: str
    direction: str
    runner: str
    extra: int | None
    problem: str | None = None


def why_not() -> str | None:
    """Why peaks cannot be read on this system; None where they can."""
    return None if _CLEAR.exists() else "peak memory is read from Linux's /proc"


def growth(run: Callable[[], object]) -> tuple[int, object]:
    """How far this process's memory grew at the peak of a run, in bytes, and what the run returned."""
    _CLEAR.write_text("5")
    before = _kilobytes("VmRSS")
    result = run()
    return 1024 * (_kilobytes("VmHWM") - before), result


def _kilobytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def peaks(chosen: Sequence[Shape], data: Path | None, threads: int, progress: Progress) -> Iterator[Peak]:
    """Of the shapes that are marked for it, both passes, on so many threads."""
    marked = [shape for shape in chosen if shape.memory]
    jobs = [(shape, name) for shape in marked for name in (OURS, YARDSTICK[shape.op], *_OTHERS[shape.op])]
    progress.begin("memory", len(jobs))
    for shape, name in jobs:
        progress.step(f"{shape.op}, {shape.law.name}: {name}")
        yield from _in_child(shape, name, data, threads)


def _in_child(shape: Shape, name: str, data: Path | None, threads: int) -> list[Peak]:
    about = shape.op, shape.law.name, str(shape.sizes)
    asked = {
        "shape": {"op": shape.op, "rows": shape.rows},
        "law": shape.law.name,
        "data": str(data) if data else None,
        "sizes": asdict(shape.sizes),
        "runner": name,
        "threads": threads,
    }
    command = [sys.executable, "-m", "interformer_bench.memory", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return [Peak(*about, direction, name, None, reason[:200]) for direction in PASSES]
    found = json.loads(done.stdout.splitlines()[-1])
    return [Peak(*about, direction, name, found[direction]) for direction in PASSES]


def extra(shape: Shape, name: str, direction: str) -> int:
    """Bytes beyond inputs and outputs at the peak of one float32 call, measured in this process."""
    peer = candidates(shape.op)[name]
    tiny, arguments = (workloads.inputs(shape.op, n, shape.sizes, torch.float32) for n in ((3, 2), shape.lengths()))
    runner(shape.op, peer, tiny, direction)()
    grown, result = growth(runner(shape.op, peer, arguments, direction))
    outputs = result.values() if isinstance(result, dict) else (result,)
    kept = {x.data_ptr(): x.untyped_storage().nbytes() for x in outputs if isinstance(x, Tensor)}
    return max(0, grown - sum(kept.values()))


def main(asked: str) -> None:
    """The child: prints the bytes of both passes as JSON."""
    wanted = json.loads(asked)
    torch.set_num_threads(wanted["threads"])
    law = shapes.laws(wanted["data"])[wanted["law"]]
    shape = Shape(**wanted["shape"], law=law, sizes=Sizes(**wanted["sizes"]))
    print(json.dumps({direction: extra(shape, wanted["runner"], direction) for direction in PASSES}))


if __name__ == "__main__":
    main(sys.argv[1])
