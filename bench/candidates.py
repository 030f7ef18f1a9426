"""`python -m interformer_bench.candidates`: candidates that share their request's keys, against peers.

Requests have histories of The Complete Journey's lengths. The honest peer is SDPA request by request, which copies no
key; others pad groups of requests, or copy the keys for each candidate where that takes at most 2 GiB. Each contender
is timed at each number of threads; its best counts. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from interformer_bench import waiting

if TYPE_CHECKING:
    import torch
    from interformer_bench.peers.candidates import Requests
    from torch import Tensor

COLUMNS = (
    "requests x candidates", "keys", "sizes", "dtype", "pass", "interformer", "best peer", "ratio", "spread", "memory",
)  # fmt: skip
_MOST_COPIED = 2 << 30  # bytes of keys and values


class Line(NamedTuple):
    """Sizes of a batch of requests."""

    requests: int
    candidates: int
    head_size: int
    queries: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.requests} x {self.candidates}, H4 D{self.head_size} N{self.queries}, {self.dtype}"


def lines() -> list[Line]:
    """The lines of the bench."""
    sizes = itertools.product(((64, 8), (64, 64), (8, 64), (8, 512)), (16, 64), (1, 4), ("float32", "bfloat16"))
    return [Line(*batch, *others) for batch, *others in sizes]  # type: ignore[misc]


def make_requests(line: Line, data: Path | None) -> Requests:
    """Random queries and keys, leaves, of histories of The Complete Journey's lengths."""
    import torch
    from interformer_bench.peers.candidates import Requests
    from interformer_bench.shapes import length_distributions

    lengths = length_distributions(data)["completejourney"].lengths(line.requests)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, line.dtype)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    keys = (int(offsets[-1]), 4, line.head_size)
    rows = torch.arange(line.requests).repeat_interleave(line.candidates)
    return Requests(leaf(len(rows), line.queries, 4, line.head_size), leaf(*keys), leaf(*keys), offsets, rows)


def _calls(x: Requests, line: Line) -> dict[str, Callable[[], Tensor]]:
    import torch
    from interformer_bench.peers import OURS
    from interformer_bench.peers import candidates as peers

    functions = {OURS: peers.ours, "SDPA by request": peers.by_request, "SDPA, requests in groups": peers.in_groups}
    if 2 * x.k.nbytes * line.candidates <= _MOST_COPIED:
        functions.update({"copied keys, SDPA": peers.gathered_sdpa, "copied keys, interformer": peers.gathered_ours})
    with torch.no_grad():
        wanted, *found = (function(x) for function in functions.values())
    tolerance = 1e-4 if line.dtype == "float32" else 3e-2
    for other in found:
        torch.testing.assert_close(other, wanted, atol=tolerance, rtol=tolerance)
    return {name: lambda function=function: function(x) for name, function in functions.items()}  # type: ignore[misc]


def _pass(run: Callable[[], Tensor], x: Requests, grad: torch.Tensor | None) -> Callable[[], object]:
    import torch

    if grad is None:
        return torch.no_grad()(run)
    return lambda: torch.autograd.grad(run(), (x.q, x.k, x.v), grad)


def _directions(x: Requests) -> dict[str, Tensor | None]:
    import torch

    grad = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(1)).to(x.q.dtype)
    return {"forward": None, "forward+backward": grad}


def peak(line: Line, direction: str, data: Path | None) -> float:
    """The peak of our call's memory over inputs, outputs and gradients; in a process with `memory.ENVIRONMENT`."""
    import torch
    from interformer_bench import memory
    from interformer_bench.peers import candidates as peers

    warm = make_requests(line._replace(requests=2, candidates=2), data)
    _pass(lambda: peers.ours(warm), warm, _directions(warm)[direction])()
    x = make_requests(line, data)
    grad = _directions(x)[direction]
    grown, result = memory.growth(_pass(lambda: peers.ours(x), x, grad))
    results = result if isinstance(result, tuple) else (result,)
    made = sum(part.nbytes for part in results if isinstance(part, torch.Tensor))
    inputs = sum(part.nbytes for part in (x.q, x.k, x.v))
    if grad is not None:
        inputs, made = inputs + grad.nbytes, made + grad.nbytes  # and the output
    return (inputs + grown) / (inputs + made)


def _peak_in_child(line: Line, direction: str, chosen: argparse.Namespace) -> str:
    from interformer_bench import memory

    data = ["--data", str(chosen.data)] if chosen.data else []
    return memory.of_child("candidates", ["--peak", f"{line}: {direction}", "--threads", str(chosen.threads), *data])


def measure(chosen: argparse.Namespace, selected: Sequence[Line]) -> tuple[str, list[tuple[str, ...]]]:
    """The head and the rows of the table."""
    import torch
    from interformer_bench import contest, quiet, report

    watch = quiet.Watch(chosen.threads)
    table: list[tuple[str, ...]] = []
    for line in selected:
        x = make_requests(line, chosen.data)
        calls, keys = _calls(x, line), f"{x.offsets.diff().double().mean():.0f} ({int(x.offsets.diff().max())})"
        for direction, grad in _directions(x).items():
            passes = {name: _pass(run, x, grad) for name, run in calls.items()}
            ours, peer, ratio, spread = watch.during(
                lambda passes=passes: contest.cells(contest.best_times(passes, chosen.threads, chosen.seconds))  # type: ignore[misc]
            )
            ratio = ratio if watch.busy_since_last() is None else quiet.NO_RATIO
            sizes = f"H4 D{line.head_size} N{line.queries}"
            batch = f"{line.requests} x {line.candidates}", keys, sizes, line.dtype
            table.append((*batch, direction, ours, peer, ratio, spread, _peak_in_child(line, direction, chosen)))
            print(" | ".join(table[-1]), flush=True)
    head = f"{chosen.threads} threads, kernels: {report.isa()}, torch {torch.__version__}. "
    return head + f"{waiting.described()} {quiet.described(watch.checks)}", table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.candidates", description=__doc__)
    parser.add_argument("--line", action="append", metavar="TEXT", help="lines that contain TEXT")
    parser.add_argument("--data", type=Path, help="directory with the length files")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long each call and pass is timed")
    parser.add_argument("--peak", metavar="LINE", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there")
    chosen = parser.parse_args(arguments)
    if chosen.peak:
        import torch

        torch.set_num_threads(chosen.threads)
        name, direction = chosen.peak.split(": ")
        print(f"{peak(next(line for line in lines() if str(line) == name), direction, chosen.data):.2f}")
        return 0
    if arguments is None:
        waiting.restart()
    from interformer_bench import report

    from interformer_kernels._files import write_text

    selected = [line for line in lines() if not chosen.line or any(text in str(line) for text in chosen.line)]
    head, table = measure(chosen, selected)
    text = f"{head}\n\n{report.rows(COLUMNS, table)}\n"
    print(text)
    if chosen.out:
        write_text(chosen.out, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
