"""Tests of the Triton kernels in Triton's interpreter; collected only under TRITON_INTERPRET=1 (`make triton-test`).

A process is in one mode for good: Triton decides at its import whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import sys
from pathlib import Path

from interformer_kernels import _backend

collect_ignore_glob = [] if _backend.interprets_triton() else ["test_*"]

if _backend.interprets_triton():
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    from quick_interpreter import make_quick

    make_quick()
