"""The modules of `make gpu-report`, `make gpu-kit` and `make gpu-rehearsal`, for their tests."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

from gpu import command, guard, inside, kit, plan, planted, profiles, results, run, table  # noqa: E402

__all__ = ["ROOT", "command", "guard", "inside", "kit", "plan", "planted", "profiles", "results", "run", "table"]
