"""Warnings that are logged once each: why a call was not served by the ops."""

from __future__ import annotations

import functools
import logging

_log = logging.getLogger("interformer_kernels")


@functools.cache
def _warn(message: str) -> None:
    _log.warning(message)


def warn_once(message: str) -> None:
    """Log `message` as a warning, the first time it is given."""
    _warn(message)


# Under torch.compile the function runs while the call is traced, instead of breaking the graph. This is the mark that
# torch.compiler.assume_constant_result sets; importing that function would take a second.
warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
