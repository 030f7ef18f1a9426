"""`python -m interformer_bench.options`: each option of attention against the plain call, and against peers.

Peers compute the same by rows and on padded rows, also grouped by length: SDPA with an explicit mask or bias, and eager
PyTorch where SDPA lacks the option. Each is timed with its backward, too, at each number of threads; its best counts.
FlexAttention, compiled for each option, has a forward alone on CPUs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from interformer_bench import single, waiting

if TYPE_CHECKING:
    from interformer_bench.peers.options import Batch
    from torch import Tensor

COLUMNS = ("option", "rows x mean", "pass", "interformer", "of plain", "best peer", "ratio", "spread", "threads")


class Line(NamedTuple):
    """An option on a batch: the arguments of `jagged_attention`, made for its rows."""

    name: str
    batch: str
    options: Callable[[Batch], dict[str, Any]]


def lines() -> list[Line]:
    """The lines of the bench; the plain call of a batch comes first."""
    made: list[Line] = []
    for batch in ("movielens", "uniform 1..50"):
        made += [
            Line("plain", batch, lambda _: {}),
            Line("position bias", batch, lambda b: {"position_bias": b.table(401)}),
            Line("time bias", batch, lambda b: b.time()),
            Line("both biases", batch, lambda b: {"position_bias": b.table(401), **b.time()}),
            Line("dropout 0.1", batch, lambda _: {"dropout_p": 0.1, "dropout_seed": 7}),
            Line("softcap", batch, lambda _: {"softcap": 20.0}),
            Line("sinks", batch, lambda b: {"sinks": b.table(1)[:, 0].detach().requires_grad_()}),
        ]
    long = "all 2048"
    return [
        *made,
        Line("plain", long, lambda _: {}),
        Line("causal", long, lambda _: {"causal": True}),
        Line("window of 64", long, lambda _: {"window": (63, 0)}),
        Line("window of 64, 128 targets", long, lambda b: _targets(b, 128)),
    ]


def _targets(batch: Batch, count: int) -> dict[str, Any]:
    targets = batch.offsets.new_full((len(batch.offsets) - 1,), count)
    return {"causal": True, "window": (63, 0), "num_targets": targets}


def make_batch(name: str, data: Path | None) -> Batch:
    """The rows of a distribution."""
    import torch
    from interformer_bench.peers.options import Batch
    from interformer_bench.shapes import length_distributions

    if name == "all 2048":
        lengths, heads, size = [2048] * 4, 4, 32
    else:
        rows, heads, size = {"movielens": (256, 4, 16), "uniform 1..50": (1024, 2, 32)}[name]
        lengths = list(length_distributions(data)[name].lengths(rows))
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total = int(offsets[-1])
    q, k, v = (torch.randn(total, heads, size, generator=generator).requires_grad_() for _ in range(3))
    times = torch.randint(0, 100_000, (total,), generator=generator).sort().values
    return Batch((q, k, v), offsets, times)


# ---------------------------------------------------------------- measuring


def _ours(batch: Batch, options: dict[str, Any]) -> Callable[[], Tensor]:
    from interformer_kernels import jagged_attention

    return lambda: jagged_attention(*batch.tensors, batch.offsets, **options)  # type: ignore[return-value]


def _pass(run: Callable[[], Tensor], batch: Batch, options: dict[str, Any], backward: bool) -> Callable[[], object]:
    """The call without gradients, or with those of the batch's tensors and of what options learn."""
    import torch

    if not backward:
        return torch.no_grad()(run)
    made = [options.get(name) for name in ("position_bias", "time_bias", "sinks")]
    leaves = [*batch.tensors, *(x for x in made if x is not None)]
    grad = torch.randn(batch.tensors[0].shape, generator=torch.Generator().manual_seed(2))
    return lambda: torch.autograd.grad(run(), leaves, grad)


def _calls(batch: Batch, options: dict[str, Any], backward: bool, flex: bool) -> dict[str, Callable[[], object]]:
    import torch
    from interformer_bench.peers import buckets
    from interformer_bench.peers import options as peers

    functions: dict[str, Callable[[], Tensor]] = {
        "interformer": _ours(batch, options),
        "by row": lambda: peers.by_row(batch, options),
        "padded": lambda: peers.grouped(batch, options, peers.in_one_group),
        "bucketed": lambda: peers.grouped(batch, options, buckets.by_powers),
        "sorted": lambda: peers.grouped(batch, options, buckets.by_chunks),
    }
    if flex and not backward and not {"dropout_p", "sinks"} & options.keys():
        functions["FlexAttention"] = lambda: peers.flex(batch, options)
    if "dropout_p" not in options:
        with torch.no_grad():
            ours, *others = (run() for run in functions.values())
        for found in others:
            torch.testing.assert_close(found, ours, atol=1e-4, rtol=1e-4)
    return {name: _pass(run, batch, options, backward) for name, run in functions.items()}


def _measured(batch: Batch, line: Line, backward: bool, chosen: argparse.Namespace) -> tuple[str, ...]:
    """The cells of a line: our time, its ratio to the plain call's in turn with it, the best peer's, our spread."""
    import torch
    from interformer_bench import contest, timing

    torch.set_num_threads(chosen.threads)  # FlexAttention is compiled for so many
    options = line.options(batch)
    calls = _calls(batch, options, backward, chosen.compile)
    pair = {"plain": _pass(_ours(batch, {}), batch, {}, backward), "option": calls["interformer"]}
    cost = timing.interleaved(pair, seconds=chosen.seconds)
    ours, peer, ratio, spread = contest.cells(contest.best_times(calls, chosen.threads, chosen.seconds))
    return ours, f"{cost['option'].median / cost['plain'].median:.2f}", peer, ratio, spread


def measure(chosen: argparse.Namespace, selected: Sequence[Line]) -> tuple[str, list[tuple[str, ...]]]:
    """The head and the rows of the table."""
    from interformer_bench import quiet

    watch = quiet.Watch(chosen.threads)
    batches = {line.batch: make_batch(line.batch, chosen.data) for line in selected}
    table: list[tuple[str, ...]] = []
    for line, backward in itertools.product(selected, (False, True)):
        batch = batches[line.batch]
        lengths = batch.offsets.diff()
        name = f"{line.batch}: {len(lengths)} x {lengths.double().mean():.0f}"
        time, cost, peer, ratio, spread = watch.during(
            lambda line=line, batch=batch, backward=backward: _measured(batch, line, backward, chosen)  # type: ignore[misc]
        )
        cost, ratio = (cost, ratio) if watch.busy_since_last() is None else (quiet.NO_RATIO, quiet.NO_RATIO)
        direction = "forward+backward" if backward else "forward"
        table.append((line.name, name, direction, time, cost, peer, ratio, spread, str(chosen.threads)))
        single.show(table[-1])
    return single.head(chosen.threads, watch, "float32, "), table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = single.parser("options", __doc__, seconds=0.6)
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave out FlexAttention, compiled for each option"
    )
    chosen = parser.parse_args(arguments)
    if arguments is None:
        waiting.restart()
    from interformer_bench import report

    texts = [*chosen.line, "plain"] if chosen.line else None
    head, table = measure(chosen, single.named(lines(), texts, lambda line: line.name))
    return single.finish(chosen, f"{head}\n\n{report.rows(COLUMNS, table)}\n")


if __name__ == "__main__":
    raise SystemExit(main())
