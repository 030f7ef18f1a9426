"""`python -m interformer_bench.candidates`: candidates that share their request's keys, against peers.

Requests have histories of The Complete Journey's lengths. The honest peer is SDPA request by request, which copies no
key; others pad groups of requests, or copy the keys for each candidate where that takes at most 2 GiB. Each contender
is timed at each number of threads; its best counts. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from interformer_bench import single, waiting

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


def measure(chosen: argparse.Namespace, selected: Sequence[Line]) -> tuple[str, list[tuple[str, ...]]]:
    """The head and the rows of the table."""
    from interformer_bench import contest, memory, quiet

    watch = quiet.Watch(chosen.threads)
    table: list[tuple[str, ...]] = []
    for line in selected:
        x = make_requests(line, chosen.data)
        calls, keys = _calls(x, line), f"{x.offsets.diff().double().mean():.0f} ({int(x.offsets.diff().max())})"
        sizes = f"H4 D{line.head_size} N{line.queries}"
        for direction, grad in _directions(x).items():
            passes = {name: _pass(run, x, grad) for name, run in calls.items()}
            times = watch.during(
                lambda passes=passes: contest.best_times(passes, chosen.threads, chosen.seconds)  # type: ignore[misc]
            )
            ours, peer, ratio, spread = contest.cells(times)
            ratio = ratio if watch.busy_since_last() is None else quiet.NO_RATIO
            peak = memory.of_child("candidates", single.child_options(chosen, f"{line}: {direction}"))
            batch = f"{line.requests} x {line.candidates}", keys, sizes, line.dtype
            table.append((*batch, direction, ours, peer, ratio, spread, peak))
            single.show(table[-1])
    return single.head(chosen.threads, watch), table


def _print_peak(text: str, data: Path | None) -> None:
    name, direction = text.split(": ")
    print(f"{peak(next(line for line in lines() if str(line) == name), direction, data):.2f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = single.parser("candidates", __doc__, seconds=0.5)
    parser.add_argument("--peak", metavar="LINE", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if arguments is None and not chosen.peak:
        waiting.restart()
    import torch
    from interformer_bench import report

    torch.set_num_threads(chosen.threads)
    if chosen.peak:
        _print_peak(chosen.peak, chosen.data)
        return 0
    head, table = measure(chosen, single.named(lines(), chosen.line))
    return single.finish(chosen, f"{head}\n\n{report.rows(COLUMNS, table)}\n")


if __name__ == "__main__":
    raise SystemExit(main())
