"""The extent of the tests: with EVERY=1 (`make nightly`) all cases, which takes hours; else a part that is fixed."""

from __future__ import annotations

import os

EVERY = bool(os.environ.get("EVERY"))


def most_draws(max_draws: int) -> int | None:
    """Draws of a case on a slow backend, or of a whole model; quantities that need more are not judged."""
    return None if EVERY else max_draws
