"""Faulty implementations for the tests of the GPU checks, and the findings that they cause."""

from __future__ import annotations

from collections.abc import Callable

from interformer_bench import gpu_checks
from interformer_bench.check_context import CheckContext, Finding, Inputs
from interformer_bench.gpu_place import Place
from torch import Tensor

from interformer_kernels import testing

PLACE = Place("cpu", tiny=True)
_SERVING = PLACE.backend("triton")  # outside of `served`, which torch.compile traces
OPS = testing.OPS
Outputs = tuple[Tensor, "Tensor | None"]
Serve = Callable[[str, Inputs], Outputs]


def served(op: str, inputs: Inputs) -> Outputs:
    return testing.call(op, inputs, _SERVING)


def ask(kind: str, op: str, serve: Serve = served, place: Place = PLACE) -> list[Finding]:
    return list(gpu_checks.KINDS[kind].run(CheckContext(place, op, "triton", serve)))


def wrong_findings(kind: str, op: str, serve: Serve, place: Place = PLACE) -> list[Finding]:
    return [finding for finding in ask(kind, op, serve, place) if finding.ok is False]


def counted(change: Callable[[int, Tensor], Tensor]) -> Serve:
    """An implementation whose outputs depend on the number of earlier calls."""
    calls = iter(range(10**6))

    def serve(op: str, inputs: Inputs) -> Outputs:
        out, lse = served(op, inputs)
        return change(next(calls), out), lse

    return serve
