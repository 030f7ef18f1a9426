"""The door for DTensors: an op that is called with them goes by `_dtensor.py`, which is imported only then."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from interformer_kernels.ops._public import PublicOp
from interformer_kernels.ops._spec import PLAIN_TENSORS

# Kinds of arguments that are no DTensors, asked before `isinstance`, which takes four times as long.
_NO_DTENSORS = frozenset((*PLAIN_TENSORS, types.NoneType, bool, int, float, str))

P = ParamSpec("P")
R = TypeVar("R")


def over_shards(op: PublicOp) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function that of a public op, one that takes DTensors, too."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(function).parameters)
        op.take_signature(names)
        layouts, out = op.shard_layouts(), op.shard_out()

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # No DTensor exists before this module is imported, which takes longer than all of ours.
            module = sys.modules.get("torch.distributed.tensor")
            if (
                module is None
                or _NO_DTENSORS.issuperset(map(type, values := (*args, *kwargs.values())))
                or not any(isinstance(x, module.DTensor) for x in values)
            ):
                return function(*args, **kwargs)
            from interformer_kernels.ops import _dtensor

            arguments: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
            return cast(R, _dtensor.call_on_parts(function, arguments, layouts, out))

        return call

    return decorate
