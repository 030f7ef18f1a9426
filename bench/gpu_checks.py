"""`python -m interformer_bench.gpu_checks`: what only a GPU can show to be right, beside parity on small calls.

Large batches whose rows alone give the same bits, graph replays, side streams, other offsets, misaligned and very large
tensors, full validation, autocast, torch.compile; of every op and backend. `--list` tells the checks, `--only` takes
one of them (`large-batch.pma_pooling`) or all ops of one (`large-batch`). Every finding is a line of JSON at once. With
`--device cpu --tiny` the same code runs on a few short rows with the CPU's kernels in the place of the GPU's.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from interformer_bench import check_calls, check_rows
from interformer_bench.check_ground import DTYPES, Finding, Ground
from interformer_bench.gpu_place import (
    BACKENDS,
    Place,
    Record,
    Write,
    add_arguments,
    list_them,
    told,
    want_names,
    writer,
)

from interformer_kernels import testing
from interformer_kernels._cli.errors import guarded


@dataclass(frozen=True)
class Kind:
    """One kind of check, asked of every op; `seconds` on a GPU, for one op and one backend."""

    part: int
    seconds: float
    ask: Callable[[Ground], Iterator[Finding]]


# In order of value.
KINDS = {
    "large-batch": Kind(1, 12, check_rows.large_batch),
    "graph-replay": Kind(1, 4, check_calls.graph_replay),
    "side-stream": Kind(1, 5, check_calls.side_stream),
    "index-views": Kind(1, 4, check_calls.index_views),
    "full-validation": Kind(2, 3, check_calls.full_validation),
    "misaligned": Kind(2, 5, check_calls.misaligned),
    "autocast": Kind(2, 3, check_calls.autocast),
    "compile": Kind(2, 25, check_calls.compiled),
    "beyond-int32": Kind(2, 10, check_rows.beyond_int32),
}
NAMES = [f"{kind}.{op}" for kind in KINDS for op in testing.OPS]


def plain(name: str) -> Record:
    """What `--list` tells of a check."""
    kind = KINDS[name.partition(".")[0]]
    return {"name": name, "part": kind.part, "seconds": kind.seconds, "kind": "check"}


def chosen_names(asked: Sequence[str] | None) -> list[str]:
    """The checks that are asked for, in order of value."""
    return [name for name in NAMES if asked is None or name in asked or name.partition(".")[0] in asked]


def check(name: str, ground: Ground, write: Write) -> bool:
    """Ask one check of one backend; whether nothing was found wrong."""
    start, right = time.perf_counter(), True

    def tell(finding: Finding) -> None:
        about = {"step": name, "op": ground.op, "backend": ground.backend, "seconds": time.perf_counter() - start}
        write({**finding.record(), **about})

    reasons = [ground.place.why_not(ground.op, ground.backend, dtype) for dtype in DTYPES]
    reason = next(filter(None, reasons), None)
    if reason is not None:
        tell(Finding("serves", "", False, reason))
        return False
    try:
        for finding in KINDS[name.partition(".")[0]].ask(ground):
            tell(finding)
            right &= finding.ok is not False
    except Exception as error:
        traceback.print_exc()
        tell(Finding("runs", "", False, f"failed: {told(error)}"))
        right = False
    if ground.place.gpu and not ground.place.is_lost():
        torch.cuda.empty_cache()
    return right


def main(arguments: list[str] | None = None) -> int:
    """Ask what was chosen; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m interformer_bench.gpu_checks", description=__doc__)
    add_arguments(parser)
    chosen = parser.parse_args(arguments)
    if chosen.list:
        return list_them(map(plain, NAMES))
    want_names(parser, chosen.only, [*KINDS, *NAMES])
    place = Place(chosen.device, chosen.tiny)
    write = writer(parser, chosen, place)
    right = True
    for name in chosen_names(chosen.only):
        for backend in chosen.backend or BACKENDS:
            right &= check(name, Ground.of(place, name.partition(".")[2], backend), write)
            if place.is_lost():
                write({"kind": "failed", "step": name, "problem": "the GPU answers no more in this process"})
                return 1
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(guarded(main))
