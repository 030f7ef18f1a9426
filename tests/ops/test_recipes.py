"""The recipes of docs/recipes, and the code of the other pages, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Code under this mark uses the names of the code before it.
FENCE = re.compile(r"^(<!-- continued -->\n)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
WITH_CODE = {str(page.relative_to(DOCS)): page for page in PAGES if FENCE.search(page.read_text(encoding="utf-8"))}
# Two pages need libraries of the extra `train`.
NEEDS = {"recipes/train.md": ("numpy", "sklearn", "yaml", "filelock")}


def test_there_are_six_recipes_at_least_and_each_has_code() -> None:
    recipes = [page for page in PAGES if page.parent.name == "recipes" and page.name != "index.md"]
    assert len(recipes) >= 6
    assert {f"recipes/{page.name}" for page in recipes} <= set(WITH_CODE)


@pytest.mark.parametrize("page", WITH_CODE)
def test_code(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in NEEDS.get(page, ()):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    names: dict[str, Any] = {}
    for continued, code in FENCE.findall(WITH_CODE[page].read_text(encoding="utf-8")):
        names = names if continued else {"__name__": "recipe"}
        exec(compile(code, page, "exec"), names)


def test_recipes_are_listed() -> None:
    index = (DOCS / "recipes" / "index.md").read_text(encoding="utf-8")
    for page in (DOCS / "recipes").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index
