"""The bench of options: its lines, and that peers compute what they are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from every import EVERY
from interformer_bench import options
from interformer_bench.options import Line
from interformer_bench.peers.options import Batch


def tiny(name: str, data: Path | None = None) -> Batch:
    """A batch of a few short rows, as the bench makes them."""
    torch.manual_seed(0)
    offsets = torch.tensor([0, 9, 9, 12]) if name != "all 2048" else torch.tensor([0, 140, 280])
    total = int(offsets[-1])
    q, k, v = (torch.randn(total, 2, 4, requires_grad=True) for _ in range(3))
    return Batch((q, k, v), offsets, torch.randint(0, 1000, (total,)).sort().values)


@pytest.mark.parametrize("line", options.lines(), ids=lambda line: f"{line.batch}, {line.name}")
def test_peers_give_the_same_numbers_and_gradients(line: Line) -> None:
    batch = tiny(line.batch)
    given = line.options(batch)
    calls = options._calls(batch, given, backward=True, flex=False)  # it compares outputs itself
    ours, *peers = (call() for call in calls.values())
    for found in peers if "dropout_p" not in given else []:
        torch.testing.assert_close(found, ours, atol=1e-4, rtol=1e-4)


def test_the_table_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "make_batch", tiny)
    arguments = [
        "--line",
        "softcap",
        "--no-compile",
        "--seconds",
        "0.01",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "options.md"),
    ]
    assert options.main(arguments) == 0
    text = (tmp_path / "options.md").read_text(encoding="utf-8")
    assert text.count("| softcap |") == 4
    assert "of plain" in text


@pytest.mark.skipif(not EVERY, reason="compiles for half a minute; the bench compares whenever it runs (EVERY=1)")
def test_flex_attention_gives_the_same_numbers() -> None:
    line = next(line for line in options.lines() if line.name == "window of 64, 128 targets")
    batch = tiny(line.batch)
    assert "FlexAttention" in options._calls(batch, line.options(batch), backward=False, flex=True)
