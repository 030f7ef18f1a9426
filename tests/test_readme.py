"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize(
    ("index", "result", "shape"),
    [(0, "pooled", (3, 2, 4, 16)), (1, "padded", (3, 10, 4, 16)), (2, "out", (3, 10, 64)), (3, "logits", (1,))],
)
def test_snippet(index: int, result: str, shape: tuple[int, ...]) -> None:
    names: dict[str, Any] = {}
    exec(SNIPPETS[index], names)
    assert names[result].shape == shape
    assert names[result].isfinite().all()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
