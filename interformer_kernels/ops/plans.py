"""Plans that a user holds for a batch, so that its offsets are looked at once for all ops and layers."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels._launch import plans


class Plan:
    """Facts about a batch's offsets, made by `plan`. It is a context manager, which closes it at its end.

    Attributes:
        rows: number of rows.
        tokens: tokens of all rows, without a tail.
        longest: tokens of the longest row.
    """

    def __init__(self, facts: plans.Facts) -> None:
        self._facts: plans.Facts | None = facts
        self.rows, self.tokens, self.longest = len(facts.bounds) - 1, int(facts.bounds[-1]), facts.longest

    @property
    def closed(self) -> bool:
        """Whether calls no longer profit from the plan."""
        return self._facts is None

    def close(self) -> None:
        """Give the plan's memory back, and the offsets free to be written to. Later calls serve without a plan."""
        self._facts = None

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        closed = ", closed" if self.closed else ""
        return f"Plan(rows={self.rows}, tokens={self.tokens}, longest={self.longest}{closed})"


def plan(offsets: Tensor) -> Plan:
    """Read a batch's offsets once for all ops and layers that are given the same tensor.

    As long as the plan lives and is not closed, calls on the Triton backend whose offsets are this tensor (or lie in
    the same memory, such as a view of all of it) start no more programs than have work, leave out kernels that would
    have none, and share their lists of tiles, in the forward and in the backward. Results have the same bits with a
    plan and without. Other backends need none. For training, keep the plan with the batch until `backward` has run:

        batch.plan = interformer_kernels.plan(batch.offsets)

    Making one waits for the device (it reads the offsets), so it pays where several calls share them.

    Args:
        offsets: `[B+1]` int32 or int64, contiguous, from 0 on and non-decreasing. They must not be written to while the
            plan lives: calls raise an error then. With `kv_offsets` of their own, jagged attention needs both plans.

    Raises:
        TypeError: offsets are not a tensor of integers, or a subclass or stand-in of a tensor.
        ValueError: wrong shape or contents; or the tensor was made in `torch.inference_mode()`, where PyTorch
            does not say whether it was written to.
        RuntimeError: in code that `torch.compile` or `torch.export` traces, or while a CUDA graph is captured: both run
            again with other offsets. Calls in such code ignore plans made outside while a graph is captured.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("plan: a compiled program runs with other offsets, too: make the plan outside of it")
    checks.check_offsets("plan", "offsets", offsets, offsets.device if isinstance(offsets, Tensor) else None)
    if type(offsets) is not Tensor or offsets.is_meta:
        raise TypeError(f"plan: offsets must be a plain tensor with contents, found {_kind(offsets)}")
    if not offsets.is_contiguous():
        raise ValueError("plan: offsets must be contiguous")
    if offsets.is_inference():
        raise ValueError(
            "plan: offsets must be made outside of torch.inference_mode(), where writes to them are not noticed"
        )
    if plans.capturing(offsets):
        raise RuntimeError("plan: a CUDA graph runs with other offsets, too: no plan can be made while it is captured")
    facts = plans.make(offsets)
    if int(facts.bounds[0]) != 0 or bool((facts.bounds.diff() < 0).any()):
        raise ValueError("plan: offsets must begin with 0 and be non-decreasing")
    return Plan(facts)


def _kind(offsets: Tensor) -> str:
    return "a meta tensor" if offsets.is_meta else type(offsets).__name__
