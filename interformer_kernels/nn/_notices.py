"""What a module has to say once: why a call is served otherwise than its name promises."""

from __future__ import annotations

import functools
import logging

_log = logging.getLogger("interformer_kernels")


@functools.cache
def _warn(message: str) -> None:
    _log.warning(message)


def say_once(message: str) -> None:
    """Log a warning, the first time this message comes."""
    _warn(message)


# Under torch.compile this runs while the call is traced, instead of breaking the graph: the mark is what
# torch.compiler.assume_constant_result sets, whose import alone would take a second.
say_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
