"""Counts of a swapped module's calls: how many the ops served, and why the others took the original path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from interformer_kernels.nn._notices import warn_once

_ATTRIBUTE = "_interformer_calls"


@dataclass
class Calls:
    """The calls of one swapped module since it was swapped; calls inside a compiled graph are not counted.

    Attributes:
        served: number of calls that the ops served.
        unserved: number of calls that took the original path, by reason.
    """

    served: int = 0
    unserved: dict[str, int] = field(default_factory=dict)
    _last_reason: str = field(default="", repr=False, compare=False)

    def add_unserved(self, reason: str) -> None:
        """Count one more unserved call with this reason."""
        self.unserved[reason] = self.unserved.get(reason, 0) + 1
        self._last_reason = reason

    def __str__(self) -> str:
        """The line of the report."""
        reasons = [f"{count} not served: {reason}" for reason, count in self.unserved.items()]
        return "; ".join([f"{self.served} calls served", *reasons])


def start_counting(module: nn.Module) -> Calls:
    """Begin to count the calls of a module."""
    calls = Calls()
    setattr(module, _ATTRIBUTE, calls)
    return calls


def calls_of(module: nn.Module) -> Calls:
    """The counts of a module; fresh ones if its calls are not counted."""
    calls = module.__dict__.get(_ATTRIBUTE)
    return calls if isinstance(calls, Calls) else Calls()


def count_served(module: nn.Module) -> None:
    """Count a call of a swapped module that the ops serve."""
    if not torch.compiler.is_compiling():
        calls_of(module).served += 1


def count_unserved(module: nn.Module, name: str, path: str, reason: str) -> None:
    """Count a call of a swapped module that takes `path` instead of the ops, and warn once per reason."""
    warn_once(f"{name} takes {path} for {reason}")
    if not torch.compiler.is_compiling():
        calls_of(module).add_unserved(reason)


def count_by_children(module: nn.Module, children: Iterable[nn.Module], before: tuple[int, ...]) -> None:
    """Count a call of a module whose children did the work: as served if all their calls were.

    `before` holds the children's `unserved_counts` before the call.
    """
    if torch.compiler.is_compiling():
        return
    for child, count_before in zip(children, before, strict=True):
        calls = calls_of(child)
        if sum(calls.unserved.values()) > count_before:
            calls_of(module).add_unserved(calls._last_reason)
            return
    count_served(module)


def unserved_counts(modules: Iterable[nn.Module]) -> tuple[int, ...]:
    """The number of unserved calls of each module."""
    return tuple(sum(calls_of(module).unserved.values()) for module in modules)


# ---------------------------------------------------------------- transforms that the ops cannot serve


def unsupported_transform(masks: Iterable[Tensor | None], tensors: Iterable[Tensor | None]) -> str:
    """The reason why the ops cannot serve a call under `torch.func`; empty if they can.

    The contents of masks cannot be read under `vmap`, and the ops have no forward-mode derivative.
    """
    if torch.compiler.is_compiling():
        return ""
    if any(_batched(mask) for mask in masks if mask is not None):
        return "masks that differ under vmap, where their contents cannot be read"
    if _under_jvp() or (forward_ad._current_level >= 0 and any(_has_tangent(x) for x in tensors if x is not None)):
        return "forward-mode derivatives (jvp), which the ops do not have"
    return ""


def _batched(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _under_jvp() -> bool:
    """Whether one of the transforms around this call is `torch.func.jvp`; inner transforms may hide its tangents."""
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(transform.key() == torch._C._functorch.TransformType.Jvp for transform in transforms)


def _has_tangent(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None
