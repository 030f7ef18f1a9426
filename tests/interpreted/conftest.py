"""Tests of the Triton kernels in Triton's interpreter; collected only under TRITON_INTERPRET=1 (`make triton-test`).

A process is in one mode for good: Triton decides at its import whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import functools
from typing import Any

from interformer_kernels import _backend

collect_ignore_glob = [] if _backend.interprets_triton() else ["test_*"]


def _patch_the_language_once() -> None:
    """Triton patches its language anew at every call of one kernel function by another: half of the run time.

    Nothing is compiled in this process, so the patches of the first call may stay.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def once(function: Any) -> Any:
        patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = once


if _backend.interprets_triton():
    _patch_the_language_once()
