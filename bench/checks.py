"""Is a runner right, and would it end in time: asked of every runner on a few rows before it is timed.

Right is the error budget of `interformer_kernels.testing` for this package, and ten times as much for its peers: they
are left out for wrong answers, not for roundings.
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

_ALLOWANCE = 10.0
# The rows that are checked: so many of the law's, none longer than that (the truth is computed by the definition).
_ROWS, _LONGEST = 24, 256
# How verdicts about wrong numbers begin.
WRONG = "wrong"
# And so many score entries, where work grows with the square of the length.
_ENTRIES = 1 << 20


@dataclass(frozen=True)
class Verdict:
    """Of one runner: what is wrong with it (None: nothing), and the seconds of its calls on the small batch."""

    problem: str | None
    forward: float = 0.0
    training: float = 0.0


def small_lengths(lengths: Sequence[int], heads: int) -> tuple[int, ...]:
    """The first rows of a batch, clipped, as far as the truth is cheap; then one of a single token."""
    found: list[int] = []
    entries = 0
    for length in (min(length, _LONGEST) for length in lengths[:_ROWS]):
        entries += heads * length * length
        if found and entries > _ENTRIES:
            break
        found.append(length)
    return (*found, 1)


class Checker:
    """The truth for one op, dtype and list of lengths; holds any number of runners against it."""

    def __init__(self, op: str, lengths: Sequence[int], sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> None:
        self.op, self.lengths, self.sizes, self.dtype, self.device = op, tuple(lengths), sizes, dtype, device
        self._known: dict[bool, tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]] = {}

    def _truth(self, empty_rows: bool) -> tuple[Inputs, dict[str, Tensor], dict[str, Tensor]]:
        """Inputs, the float64 truth, and eager PyTorch's results in the inputs' own dtype."""
        if empty_rows not in self._known:
            lengths = (0, *self.lengths, 0) if empty_rows else tuple(n for n in self.lengths if n)
            made = workloads.inputs(self.op, lengths, self.sizes, self.dtype, self.device)
            exact = testing.cast_inputs(made, torch.float64)
            truth, eager = (self._by_definition(x) for x in (exact, made))
            self._known[empty_rows] = made, truth, eager
        return self._known[empty_rows]

    def _by_definition(self, arguments: Inputs) -> dict[str, Tensor]:
        return workloads.training(self.op, lambda **call: workloads.definition(self.op, call), arguments)

    def check(self, name: str, peer: Peer) -> Verdict:
        """The verdict on one runner; an exception of it is a problem like any other."""
        made, truth, eager = self._truth(peer.empty_rows)
        try:
            found = {"out": workloads.forward(peer.run, made)}
            problem = self._wrong(name, found, truth, eager)
            if problem is None and peer.trains:
                problem = self._wrong(name, workloads.training(self.op, peer.run, made), truth, eager)
            if problem is not None:
                return Verdict(problem)
            forward = timing.quickest(lambda: workloads.forward(peer.run, made), self.device)
            if not peer.trains:
                return Verdict(None, forward)
            training = timing.quickest(lambda: workloads.training(self.op, peer.run, made), self.device)
            return Verdict(None, forward, training)
        except Exception as error:
            return Verdict(f"failed: {type(error).__name__}: {_first_line(error)}")

    def _wrong(
        self, name: str, found: dict[str, Tensor], truth: dict[str, Tensor], eager: dict[str, Tensor]
    ) -> str | None:
        return wrong(found, truth, eager, 1.0 if name == OURS else _ALLOWANCE)


def wrong(
    found: dict[str, Tensor], truth: dict[str, Tensor], eager: dict[str, Tensor], allowance: float = 1.0
) -> str | None:
    """What is beyond its budget, the first of it; None where nothing is."""
    for quantity, x in found.items():
        row = testing.Sums.of(x, eager[quantity], truth[quantity]).judged(quantity)
        if not row.share <= allowance:
            return f"{WRONG} {quantity}: {row.share:.2f} of its budget, {allowance:g} allowed"
    return None


class Sample:
    """Rows of a whole batch against the truth: the longest, the shortest and some at random, as far as it is cheap.

    Sums over rows (gradients of seeds) are left to `Checker`.
    """

    def __init__(self, op: str, lengths: Sequence[int], sizes: Sizes, arguments: Inputs) -> None:
        self.op, self.lengths = op, tuple(lengths)
        self.rows = sample_rows(lengths, sizes.heads)
        few = cut(arguments, self.lengths, self.rows)
        exact = testing.cast_inputs(few, torch.float64)
        self.truth, self.eager = (
            workloads.training(op, lambda **call: workloads.definition(op, call), x) for x in (exact, few)
        )

    def problem(self, found: dict[str, Tensor], ours: bool) -> str | None:
        """What is wrong in these rows of a result of the whole batch; None where nothing is."""
        here = {name: of_rows(x, self.lengths, self.rows) for name, x in found.items() if name != "dseeds"}
        problem = wrong(here, self.truth, self.eager, 1.0 if ours else _ALLOWANCE)
        return problem and f"{problem}, in the whole batch"


def sample_rows(lengths: Sequence[int], heads: int, most: int = 16, entries: int = 1 << 28, seed: int = 0) -> list[int]:
    """Numbers of rows, the longest and the shortest with tokens among them, with so many score entries at most."""
    held = sorted((b for b in range(len(lengths)) if lengths[b]), key=lambda b: lengths[b])
    if not held:
        return []
    drawn = [held[-1], held[0], *random.Random(seed).sample(held, min(most, len(held)))]
    found: list[int] = []
    for b in dict.fromkeys(drawn):
        entries -= heads * lengths[b] ** 2
        if len(found) < most and (entries >= 0 or not found):
            found.append(b)
    return sorted(found)


def cut(arguments: Inputs, lengths: Sequence[int], rows: Sequence[int]) -> dict[str, Any]:
    """The call on these rows of a batch alone."""
    alone = [testing.alone(arguments, lengths, b) for b in rows]
    found = dict(arguments)
    for name, x in arguments.items():
        if name in ("offsets", "kv_offsets"):
            found[name] = testing.offsets_of([lengths[b] for b in rows], x.dtype, str(x.device))
        elif isinstance(x, Tensor) and alone and alone[0][name] is not x:
            found[name] = torch.cat([one[name].detach() for one in alone]).requires_grad_(x.requires_grad)
    return found


def of_rows(x: Tensor, lengths: Sequence[int], rows: Sequence[int]) -> Tensor:
    """What a tensor of rows, or of their tokens, holds of these rows."""
    return torch.cat([testing.row_of(x, lengths, b) for b in rows])


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line]
    return (telling or lines or [""])[0][:200]
