"""Tests of Triton's own launch path under a driver that launches nothing; collected only with INTERFORMER_FAKE_GPU set.

A process has one driver for good: `make target-test` runs these in processes of their own, with the Triton of the
environment and with that of the first GPU machine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

collect_ignore_glob = [] if os.environ.get("INTERFORMER_FAKE_GPU") else ["test_*"]
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
