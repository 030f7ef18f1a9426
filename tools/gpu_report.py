"""`make gpu-report`: what only a GPU can show, in order of value, in minutes, installing nothing: see `gpu/plan.py`."""

from __future__ import annotations

from gpu.command import main

if __name__ == "__main__":
    raise SystemExit(main())
