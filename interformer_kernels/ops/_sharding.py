"""The door for DTensors: an op that is called with them goes by `_dtensor.py`, which is imported only then."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def over_shards(out: str, **layouts: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let an op take DTensors; the axes of its output and of its arguments are named as in its docstring.

    Args:
        out: the output's axes, which gate and residual have, too.
        layouts: those of every other floating argument, the leading one first; `|` parts the forms that it may have,
            of which the number of axes tells.
    """

    def decorate(op: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(op).parameters)

        @functools.wraps(op)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # Nobody has a DTensor before this module was imported, which takes longer than all of ours.
            module = sys.modules.get("torch.distributed.tensor")
            if module is None or not any(isinstance(x, module.DTensor) for x in (*args, *kwargs.values())):
                return op(*args, **kwargs)
            from interformer_kernels.ops import _dtensor

            arguments: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
            found: Any = _dtensor.call_on_parts(op, arguments, layouts, out)
            return cast(R, found)

        return call

    return decorate
