"""`python -m interformer_bench.gpu`: this package against its peers on one GPU, on the shapes that models have there.

Beside what the bench of the CPU measures: calls replayed from a CUDA graph (no cost of launching), peak memory, and
rates. What was measured is written after every shape, so that a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from interformer_bench import progress, report, run, shapes, timing
from interformer_bench.grid import Shape
from interformer_bench.peers import OURS, candidates
from interformer_bench.run import Measurement
from interformer_bench.shapes import Law
from interformer_bench.workloads import Sizes

from interformer_kernels import _backend
from interformer_kernels._cli.arguments import duration
from interformer_kernels._cli.errors import guarded
from interformer_kernels._files import to_json, write_text

COLUMNS = ("op", "lengths", "sizes", "dtype", "pass", "runner", "eager", "graph", "peak", "TFLOP/s", "GB/s", "of copy")
_REPLAYS = 20

# op, law, rows, heads, head size, queries, gated
_Line = tuple[str, str, int, int, int, int, bool]
_SHAPES: tuple[_Line, ...] = (
    # The paper's public model: 2 seeds, sequences of 104 and 54.
    ("pma_pooling", "all 104", 2048, 4, 16, 2, False),
    ("jagged_attention", "all 104", 2048, 4, 16, 1, False),
    ("jagged_attention", "all 54", 2048, 8, 8, 1, False),
    ("jagged_attention", "all 104", 2048, 1, 64, 1, False),
    ("gated_cross_attention", "all 104", 2048, 4, 16, 2, True),
    # Training: up to 1000 events, 32 and 192 seeds.
    ("jagged_attention", "1000 at 0.5", 1152, 4, 64, 1, False),
    ("jagged_attention", "1000 at 1.0", 1152, 4, 128, 1, False),
    ("pma_pooling", "1000 at 0.5", 1152, 4, 64, 32, False),
    ("pma_pooling", "1000 at 1.0", 1152, 4, 128, 192, False),
    ("gated_cross_attention", "1000 at 0.5", 1152, 4, 64, 32, True),
    ("personalized_ffn", "all 256", 1152, 1, 64, 1, False),
    # Many tiny rows, and few long ones.
    ("jagged_attention", "uniform 1..32", 65536, 2, 32, 1, False),
    ("pma_pooling", "uniform 1..32", 65536, 2, 32, 2, False),
    ("gated_cross_attention", "uniform 1..32", 65536, 2, 32, 2, True),
    ("jagged_attention", "all 4096", 16, 8, 64, 1, False),
    ("pma_pooling", "all 4096", 16, 8, 64, 2, False),
    # Real lengths.
    *(("jagged_attention", law, 4096, 4, 32, 1, False) for law in ("movielens", "beauty", "grocery", "diginetica")),
    *(("pma_pooling", law, 4096, 4, 32, 2, False) for law in ("movielens", "beauty", "grocery", "diginetica")),
)


@dataclasses.dataclass(frozen=True)
class Detail:
    """What one runner took besides its time in eager PyTorch; `problem` says why there is no graph."""

    op: str
    law: str
    sizes: str
    dtype: str
    direction: str
    runner: str
    eager: float
    graph: float | None
    peak: int
    flops: int
    bytes: int
    problem: str | None = None


def gpu_shapes(data: Path | None) -> list[Shape]:
    """The shapes, the most telling first."""

    tiny = Law("uniform 1..32", "synthetic", lambda level: (level * 32 + 1).clamp(max=32))
    full = [dataclasses.replace(shapes.filled(share, 1000), name=f"1000 at {share}") for share in (0.5, 1.0)]
    made = (*(shapes.equal(length) for length in (54, 256, 4096)), *full, tiny)
    laws = {**shapes.laws(data), **{law.name: law for law in made}}
    found = []
    for op, law, rows, heads, head_size, queries, gated in _SHAPES:
        width = heads * head_size if op == "personalized_ffn" else 0
        found.append(Shape(op, laws[law], rows, Sizes(heads, head_size, queries, width, gated)))
    return found


def serves(backend: str | None, op: str) -> bool:
    """Whether there is something to measure: a backend that is named may have some of the ops only."""
    return backend is None or _backend.why_not(op, backend, "cuda", torch.bfloat16) is None


# ---------------------------------------------------------------- one runner


def graph_seconds(call: timing.Run) -> float:
    """Seconds of one replay of a call that was captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    return timing.once(graph.replay, "cuda", _REPLAYS)


def peak_bytes(call: timing.Run) -> int:
    """Bytes that one call allocates at its peak, outputs included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def details(shape: Shape, measured: list[Measurement], backend: str | None) -> Iterator[Detail]:
    """Of this package and its best peer, in both passes."""
    runners = candidates(shape.op, backend)
    for group in report.groups(measured):
        for one in filter(None, (group[OURS], report.best_peer(group))):
            if one.median is None:
                continue
            arguments = shape.inputs(getattr(torch, one.dtype), "cuda")
            call = run.runner(shape.op, runners[one.runner], arguments, one.direction)
            graph, problem = None, None
            peak = peak_bytes(call)
            try:
                graph = graph_seconds(call)
            except Exception as error:  # a peer that reads the device cannot be captured: that is a finding
                problem = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                torch.cuda.synchronize()
            about = one.op, one.law, one.sizes, one.dtype, one.direction, one.runner
            yield Detail(*about, one.median, graph, peak, one.flops, one.bytes, problem)


def lines(found: list[Detail], machine: report.Machine) -> list[tuple[str, ...]]:
    """The details as a table."""
    rows = []
    for one in found:
        seconds = one.graph or one.eager
        rates = machine.get((one.dtype, 1))
        graph = f"{one.graph * 1e3:.3g} ms" if one.graph else one.problem or "-"
        rows.append((
            one.op, one.law, one.sizes, one.dtype, one.direction, one.runner, f"{one.eager * 1e3:.3g} ms", graph,
            f"{one.peak / 2**20:.1f} MiB", f"{one.flops / seconds / 1e12:.2f}", f"{one.bytes / seconds / 1e9:.0f}",
            f"{one.bytes / seconds / rates.copy:.0%}" if rates else "-",
        ))  # fmt: skip
    return rows


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    """Measure until the time is up; 1 where this package is wrong somewhere."""
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.gpu", description=__doc__)
    parser.add_argument("--backend", help="of this package; the fastest where left out")
    parser.add_argument("--data", type=Path, help="directory with the length files")
    parser.add_argument("--minutes", type=duration, default=5.0, help="no shape is begun after that")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets bench.json and bench.md")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(1, "interformer_bench.gpu: needs a GPU that torch can use, found none\n")
    end = time.perf_counter() + 60 * chosen.minutes
    machine, shown = timing.Machine("cuda"), progress.Lines()
    measured: list[Measurement] = []
    found: list[Detail] = []
    left_out: list[str] = []
    shapes_here = [shape for shape in gpu_shapes(chosen.data) if serves(chosen.backend, shape.op)]
    jobs = [(shape, dtype) for shape in shapes_here for dtype in ("bfloat16", "float32")]
    for shape, dtype in jobs:
        if time.perf_counter() > end:
            left_out.append(f"{shape.op}, {shape.law.name}, {shape.sizes}, {dtype}")
            continue
        settings = run.Settings((dtype,), "cuda", (1,), 0.4, backend=chosen.backend, progress=shown)
        here = list(run.measure([shape], settings, machine))
        measured += here
        found += details(shape, here, chosen.backend)
        _write(chosen.out, report.Report(measured, machine.rates()), found, left_out)
        torch.cuda.empty_cache()
    _write(chosen.out, report.Report(measured, machine.rates()), found, left_out)
    return 1 if any(one.problem and one.runner == OURS for one in measured) else 0


def _write(folder: Path, made: report.Report, found: list[Detail], left_out: list[str]) -> None:
    told = {**report.plain(made), "details": [dataclasses.asdict(one) for one in found], "left_out": left_out}
    write_text(folder / "bench.json", to_json(told))
    parts = [report.markdown(made), "## Graphs, memory, rates", report.rows(COLUMNS, lines(found, made.machine))]
    if left_out:
        parts += ["## Left out, since the time was up", "\n".join(f"- {one}" for one in left_out)]
    write_text(folder / "bench.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    raise SystemExit(guarded(main))
