"""How the calls of a swapped module went: which the ops served, and why others took the original path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from interformer_kernels.nn._notices import say_once

_ATTRIBUTE = "_interformer_calls"


@dataclass
class Calls:
    """The calls of one swapped module since it was swapped; those inside a compiled graph are not counted.

    Attributes:
        served: how many the ops served.
        unserved: how many took the original path, by reason.
    """

    served: int = 0
    unserved: dict[str, int] = field(default_factory=dict)
    _latest: str = field(default="", repr=False, compare=False)

    def not_served(self, why: str) -> None:
        """One more for this reason."""
        self.unserved[why] = self.unserved.get(why, 0) + 1
        self._latest = why

    def __str__(self) -> str:
        """As a line of the report."""
        reasons = [f"{count} not served: {why}" for why, count in self.unserved.items()]
        return "; ".join([f"{self.served} calls served", *reasons])


def follow(module: nn.Module) -> Calls:
    """Begin to count the calls of a module."""
    calls = Calls()
    setattr(module, _ATTRIBUTE, calls)
    return calls


def calls_of(module: nn.Module) -> Calls:
    """The counts of a module; of one that is not followed, new ones."""
    found = module.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, Calls) else Calls()


def count_served(module: nn.Module) -> None:
    """A swapped module tells that the ops serve this call."""
    if not torch.compiler.is_compiling():
        calls_of(module).served += 1


def count_unserved(module: nn.Module, name: str, why: str) -> None:
    """A swapped module tells why this call takes the original path; the log says so the first time."""
    say_once(f"{name} takes {why}")
    if not torch.compiler.is_compiling():
        calls_of(module).not_served(why.split(" for ", 1)[-1])


def count_as(module: nn.Module, parts: Iterable[nn.Module], before: tuple[int, ...]) -> None:
    """Count a call of a module whose parts did the work: served if all of theirs were.

    `before` are the numbers of calls that each part had not been served by then (`unserved_of`).
    """
    if torch.compiler.is_compiling():
        return
    for part, earlier in zip(parts, before, strict=True):
        calls = calls_of(part)
        if sum(calls.unserved.values()) > earlier:
            calls_of(module).not_served(calls._latest)
            return
    count_served(module)


def unserved_of(parts: Iterable[nn.Module]) -> tuple[int, ...]:
    """How many calls of each part have not been served."""
    return tuple(sum(calls_of(part).unserved.values()) for part in parts)


# ---------------------------------------------------------------- transforms that the ops cannot serve


def transformed(masks: Iterable[Tensor | None], tensors: Iterable[Tensor | None]) -> str:
    """Why a call under `torch.func` cannot be served; empty where it can.

    Masks are data, which `vmap` does not let anyone look at; and the ops have no forward-mode derivative.
    """
    if torch.compiler.is_compiling():
        return ""
    if any(_batched(mask) for mask in masks if mask is not None):
        return "masks that differ under vmap, where their contents cannot be read"
    if _under_jvp() or (forward_ad._current_level >= 0 and any(_has_tangent(x) for x in tensors if x is not None)):
        return "forward-mode derivatives (jvp), which the ops have not"
    return ""


def _batched(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _under_jvp() -> bool:
    """Whether one of the transforms around this call is `torch.func.jvp`, whose tangents inner ones may hide."""
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(transform.key() == torch._C._functorch.TransformType.Jvp for transform in transforms)


def _has_tangent(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None
