"""Whether a runner is right, and how long it would take: every runner is checked on a few rows before it is timed.

This package must keep the error budget of `interformer_kernels.testing`; its peers may use ten times as much, since
they are excluded for wrong answers, not for roundings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from interformer_bench import timing, workloads
from interformer_bench.peers import OURS, Peer
from interformer_bench.workloads import Inputs, Sizes
from torch import Tensor

from interformer_kernels import testing

_PEER_ALLOWANCE = 10.0
# Rows that are checked at most, and their longest length: the truth is computed by the definition, which is slow.
_MAX_ROWS, _MAX_LENGTH = 24, 256
# Prefix of verdicts about wrong numbers.
WRONG = "wrong"
# Score entries that are checked at most, where work grows with the square of the length.
_MAX_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """A runner's problem, None where it has none, and the seconds of its calls on the small batch."""

    problem: str | None
    forward: float = 0.0
    training: float = 0.0


def small_lengths(lengths: Sequence[int], heads: int) -> tuple[int, ...]:
    """The first rows of a batch, clipped, while the truth is cheap; then one row of a single token."""
    chosen: list[int] = []
    entries = 0
    for length in (min(length, _MAX_LENGTH) for length in lengths[:_MAX_ROWS]):
        entries += heads * length * length
        if chosen and entries > _MAX_ENTRIES:
            break
        chosen.append(length)
    return (*chosen, 1)


class Checker:
    """The truth for one op, dtype and list of lengths, against which any number of runners are checked."""

    def __init__(self, op: str, lengths: Sequence[int], sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> None:
        self.op, self.lengths, self.sizes, self.dtype, self.device = op, tuple(lengths), sizes, dtype, device
        self._cache: dict[bool, tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]] = {}

    def _truth(self, empty_rows: bool) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
        """Inputs, the float64 truth, and eager PyTorch's results in the inputs' own dtype."""
        if empty_rows not in self._cache:
            lengths = (0, *self.lengths, 0) if empty_rows else tuple(n for n in self.lengths if n)
            inputs = workloads.inputs(self.op, lengths, self.sizes, self.dtype, self.device)
            in_float64 = testing.cast_inputs(inputs, torch.float64)
            truth, eager = (self._by_definition(x) for x in (in_float64, inputs))
            self._cache[empty_rows] = inputs, truth, eager
        return self._cache[empty_rows]

    def _by_definition(self, arguments: Inputs) -> dict[str, Tensor]:
        return workloads.training(self.op, lambda **call: workloads.definition(self.op, call), arguments)

    def check(self, name: str, peer: Peer) -> Verdict:
        """The verdict on one runner; an exception counts as a problem."""
        inputs, truth, eager = self._truth(peer.empty_rows)
        try:
            output = {"out": workloads.forward(peer.run, inputs)}
            problem = self._wrong(name, output, truth, eager)
            if problem is None and peer.trains:
                problem = self._wrong(name, workloads.training(self.op, peer.run, inputs), truth, eager)
            if problem is not None:
                return Verdict(problem)
            forward = timing.quickest(lambda: workloads.forward(peer.run, inputs), self.device)
            if not peer.trains:
                return Verdict(None, forward)
            training = timing.quickest(lambda: workloads.training(self.op, peer.run, inputs), self.device)
            return Verdict(None, forward, training)
        except Exception as error:
            return Verdict(f"failed: {error_line(error)}")

    def _wrong(
        self, name: str, results: dict[str, Tensor], truth: dict[str, Tensor], eager: dict[str, Tensor]
    ) -> str | None:
        return wrong(results, truth, eager, 1.0 if name == OURS else _PEER_ALLOWANCE)


def wrong(
    results: dict[str, Tensor], truth: dict[str, Tensor], eager: dict[str, Tensor], allowance: float = 1.0
) -> str | None:
    """The first quantity that exceeds its budget, in words; None where all are within."""
    for quantity, x in results.items():
        row = testing.Sums.of(x, eager[quantity], truth[quantity]).judged(quantity)
        if not row.share <= allowance:
            return f"{WRONG} {quantity}: {row.share:.2f} of its budget, {allowance:g} allowed"
    return None


class Sample:
    """Rows of a whole batch against the truth: the longest, the shortest and some at random, while it is cheap.

    Sums over rows (gradients of seeds) are left to `Checker`.
    """

    def __init__(self, op: str, lengths: Sequence[int], sizes: Sizes, arguments: Inputs) -> None:
        self.op, self.lengths = op, tuple(lengths)
        self.rows = sample_rows(lengths, sizes.heads)
        sampled = call_on_rows(arguments, self.lengths, self.rows)
        in_float64 = testing.cast_inputs(sampled, torch.float64)
        self.truth, self.eager = (
            workloads.training(op, lambda **call: workloads.definition(op, call), x) for x in (in_float64, sampled)
        )

    def problem(self, results: dict[str, Tensor], is_ours: bool) -> str | None:
        """The first error in these rows of a result of the whole batch; None where they are right."""
        sampled = {name: select_rows(x, self.lengths, self.rows) for name, x in results.items() if name != "dseeds"}
        problem = wrong(sampled, self.truth, self.eager, 1.0 if is_ours else _PEER_ALLOWANCE)
        return problem and f"{problem}, in the whole batch"


def sample_rows(
    lengths: Sequence[int], heads: int, max_rows: int = 16, max_entries: int = 1 << 28, seed: int = 0
) -> list[int]:
    """Indices of rows: the longest, the shortest with tokens, and random ones, bounded in number and score entries."""
    not_empty = sorted((b for b in range(len(lengths)) if lengths[b]), key=lambda b: lengths[b])
    if not not_empty:
        return []
    random_rows = random.Random(seed).sample(not_empty, min(max_rows, len(not_empty)))
    chosen: list[int] = []
    for b in dict.fromkeys([not_empty[-1], not_empty[0], *random_rows]):
        max_entries -= heads * lengths[b] ** 2
        if len(chosen) < max_rows and (max_entries >= 0 or not chosen):
            chosen.append(b)
    return sorted(chosen)


def call_on_rows(arguments: Inputs, lengths: Sequence[int], rows: Sequence[int]) -> dict[str, Any]:
    """The arguments of a call on these rows of a batch alone."""
    single_rows = [testing.alone(arguments, lengths, b) for b in rows]
    selected = dict(arguments)
    for name, x in arguments.items():
        if name in ("offsets", "kv_offsets"):
            selected[name] = testing.offsets_of([lengths[b] for b in rows], x.dtype, str(x.device))
        elif isinstance(x, Tensor) and single_rows and single_rows[0][name] is not x:
            tokens = torch.cat([row[name].detach() for row in single_rows])
            selected[name] = tokens.requires_grad_(x.requires_grad)
    return selected


def select_rows(x: Tensor, lengths: Sequence[int], rows: Sequence[int]) -> Tensor:
    """The part of a tensor of rows, or of their tokens, that belongs to these rows."""
    return torch.cat([testing.row_of(x, lengths, b) for b in rows])


def error_line(error: Exception) -> str:
    """An exception's type and message in one line; of a long message, the line that names the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "error:" in line]
    return f"{type(error).__name__}: {(named or lines or [''])[0][:200]}"
