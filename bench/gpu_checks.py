"""`python -m interformer_bench.gpu_checks`: correctness checks that need a GPU, beyond parity on small calls.

Large batches whose rows have the same bits alone, graph replays, side streams, other kinds of offsets, misaligned and
very large tensors, full validation, autocast and torch.compile, for every op and backend; and a model's training step
in a graph. `--list` prints the checks;
`--only` takes one of them (`large-batch.pma_pooling`) or one for all ops (`large-batch`). Every finding is appended at
once as a line of JSON. With `--device cpu --tiny` the same code runs on a few short rows, and CPU kernels stand in for
the GPU's.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from interformer_bench import check_calls, check_model, check_rows
from interformer_bench.check_context import DTYPES, CheckContext, Finding
from interformer_bench.checks import error_line
from interformer_bench.gpu_place import (
    BACKENDS,
    Place,
    Record,
    Write,
    add_arguments,
    print_list,
    require_known_names,
    writer,
)

from interformer_kernels import testing
from interformer_kernels._cli.errors import guarded


@dataclass(frozen=True)
class Kind:
    """A kind of check that each of `ops` gets; `seconds` is its time on a GPU for one op and one backend."""

    part: int
    seconds: float
    run: Callable[[CheckContext], Iterator[Finding]]
    ops: tuple[str, ...] = testing.OPS


# In order of value.
KINDS = {
    "large-batch": Kind(1, 12, check_rows.large_batch),
    "graph-replay": Kind(1, 4, check_calls.graph_replay),
    "graph-step": Kind(1, 20, check_model.graph_step, (check_model.OP,)),
    "side-stream": Kind(1, 5, check_calls.side_stream),
    "index-views": Kind(1, 4, check_calls.index_views),
    "full-validation": Kind(2, 3, check_calls.full_validation),
    "misaligned": Kind(2, 5, check_calls.misaligned),
    "autocast": Kind(2, 3, check_calls.autocast),
    "compile": Kind(2, 25, check_calls.compiled),
    "beyond-int32": Kind(2, 10, check_rows.beyond_int32),
}
NAMES = [f"{name}.{op}" for name, kind in KINDS.items() for op in kind.ops]


def plain(name: str) -> Record:
    """The entry of a check in `--list`."""
    kind = KINDS[name.partition(".")[0]]
    return {"name": name, "part": kind.part, "seconds": kind.seconds, "kind": "check"}


def chosen_names(requested: Sequence[str] | None) -> list[str]:
    """The requested checks, in order of value."""
    return [name for name in NAMES if requested is None or {name, name.partition(".")[0]} & set(requested)]


def check(name: str, context: CheckContext, write: Write) -> bool:
    """Run one check on one backend; returns whether nothing was wrong."""
    start, right = time.perf_counter(), True

    def record(finding: Finding) -> None:
        fields = {"step": name, "op": context.op, "backend": context.backend, "seconds": time.perf_counter() - start}
        write({**finding.record(), **fields})

    ops = testing.OPS if context.op == check_model.OP else (context.op,)
    reasons = [context.place.unsupported_reason(op, context.backend, dtype) for op in ops for dtype in DTYPES]
    reason = next(filter(None, reasons), None)
    if reason is not None:
        record(Finding("serves", "", False, reason))
        return False
    try:
        for finding in KINDS[name.partition(".")[0]].run(context):
            record(finding)
            right &= finding.ok is not False
    except Exception as error:
        traceback.print_exc()
        record(Finding("runs", "", False, f"failed: {error_line(error)}"))
        right = False
    if context.place.gpu and not context.place.is_lost():
        torch.cuda.empty_cache()
    return right


def main(arguments: list[str] | None = None) -> int:
    """Run the selected checks; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.gpu_checks", description=__doc__)
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    if chosen.list:
        return print_list(map(plain, NAMES))
    require_known_names(parser, chosen.only, [*KINDS, *NAMES])
    place = Place(chosen.device, chosen.tiny)
    write = writer(parser, chosen, place)
    right = True
    for name in chosen_names(chosen.only):
        for backend in chosen.backend or BACKENDS:
            right &= check(name, CheckContext.of(place, name.partition(".")[2], backend), write)
            if place.is_lost():
                write({"kind": "failed", "step": name, "problem": "the GPU no longer responds in this process"})
                return 1
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(guarded(main))
