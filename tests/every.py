"""How much the tests ask. With EVERY=1 (`make nightly`) all of it, which takes hours; else a part that is fixed."""

from __future__ import annotations

import os

EVERY = bool(os.environ.get("EVERY"))


def most_draws(few: int) -> int | None:
    """Draws of a case on a slow backend, or of a whole model: quantities that so few leave short are not judged."""
    return None if EVERY else few
