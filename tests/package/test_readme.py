"""The code of the README and of the usage page runs as it stands there, and the README's figures are measured ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from interformer_bench.result_tables import read_results

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
SNIPPETS = {
    name: re.findall(r"```python\n(.*?)```", page, re.DOTALL) for name, page in (("readme", README), ("usage", USAGE))
}
RESULTS = ("cpu-avx512-intel.md", "cpu-avx512-zen4.md", "cpu-avx2-intel.md", "cpu-avx2-zen4.md")


def run(page: str, index: int) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(SNIPPETS[page][index], names)
    return names


def test_there_are_snippets() -> None:
    assert {name: len(snippets) for name, snippets in SNIPPETS.items()} == {"readme": 1, "usage": 5}


@pytest.mark.parametrize(
    ("page", "index", "result", "shape"),
    [
        ("readme", 0, "after", (3, 10, 4, 16)),
        ("usage", 0, "pooled", (3, 2, 4, 16)),
        ("usage", 1, "padded", (3, 10, 4, 16)),
        ("usage", 2, "out", (3, 10, 64)),
        ("usage", 3, "x", (9, 2, 16)),
        ("usage", 4, "logits", (1,)),
    ],
)
def test_snippet(page: str, index: int, result: str, shape: tuple[int, ...]) -> None:
    names = run(page, index)
    assert names[result].shape == shape
    assert names[result].isfinite().all()


def test_before_and_after_are_the_same() -> None:
    names = run("readme", 0)
    torch.testing.assert_close(names["after"][names["mask"]], names["before"][names["mask"]])
    assert names["after"][~names["mask"]].eq(0).all()


def test_every_measured_row_stands_in_the_results() -> None:
    table = README.partition("## Measured")[2].partition("## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) == 6
    xeon, zen = (_training_results(f"cpu-avx512-{machine}.md") for machine in ("intel", "zen4"))
    for _, op, _, shape, _, peer, ratio, ratio_on_zen, _ in rows:
        place = op.strip(" `"), shape.strip()
        assert xeon[place] == (ratio.strip(), peer.partition("(")[2].strip(" )"))
        assert zen[place][0] == ratio_on_zen.strip()


def _training_results(file: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Ratio and best peer in float32, forward and backward, by operation and shape."""
    return {
        (result.op, result.shape): (result.ratio_text, result.peer)
        for result in read_results(ROOT / "bench/results" / file)
        if (result.dtype, result.direction) == ("float32", "forward+backward")
    }


def test_every_ratio_of_whole_models_stands_in_the_results() -> None:
    results = (ROOT / "bench/results/model-avx512-zen4.md").read_text(encoding="utf-8")
    table = README.partition("InterFormer on the Zen 4")[2].partition("## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith(("| training", "| inference"))]
    lengths = ("movielens (real) | 32 x", "movielens (real) | 2048 x", "all 104 | 2048 x", "movielens (real) | 1 x")
    found = {
        (place, kind.strip()): cell.strip()
        for kind, *cells in rows
        for place, cell in zip(lengths, cells, strict=True)
        if cell.strip() != "-"
    }
    assert len(found) == 6
    for (place, kind), ratio in found.items():
        pattern = rf"^\| {re.escape(place)}[^|]*\| {kind} \| interformer \|.* the best, [a-zA-Z ,]+: {ratio} "
        assert re.search(pattern, results, re.MULTILINE), (place, kind)


@pytest.mark.parametrize("name", RESULTS)
def test_committed_results_can_be_read(name: str) -> None:
    ops = {result.op for result in read_results(ROOT / "bench/results" / name)}
    assert {"jagged_attention", "pma_pooling", "gated_cross_attention", "personalized_ffn"} <= ops


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) < 150
    assert max(len(line) for line in lines if "](" not in line) <= 122


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README + USAGE, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets
