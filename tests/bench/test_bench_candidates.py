"""The benches of candidates and of requests: peers compute what they are compared with, and tables are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interformer_bench import candidates, memory, requests
from interformer_bench.candidates import Line
from interformer_bench.peers.candidates import Requests


def tiny(line: Line, data: Path | None = None) -> Requests:
    """Three requests, one of them without keys."""
    torch.manual_seed(0)
    offsets, dtype = torch.tensor([0, 9, 9, 12]), getattr(torch, line.dtype)
    rows = torch.arange(3).repeat_interleave(line.candidates)
    shapes = (len(rows), line.queries, 4, 8), (12, 4, 8), (12, 4, 8)
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    return Requests(q, k, v, offsets, rows)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_give_the_same_numbers_and_gradients(queries: int, dtype: str) -> None:
    line = Line(3, 5, 8, queries, dtype)
    x = tiny(line)
    calls = candidates._calls(x, line)  # it compares outputs itself
    assert len(calls) == 5
    for direction, grad in candidates._directions(x).items():
        passes = [candidates._pass(run, x, grad) for run in calls.values()]
        if direction == "forward":
            continue
        wanted, *others = (run() for run in passes)
        tolerance = 1e-4 if dtype == "float32" else 5e-2
        for found in others:
            torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def test_memory_that_copies_would_take_leaves_them_out() -> None:
    assert len(candidates.lines()) == 32
    line = Line(3, 1 << 25, 8, 1, "float32")
    x = tiny(line._replace(candidates=2))
    assert len(candidates._calls(x, line)) == 3


def test_the_table_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "make_requests", tiny)
    monkeypatch.setattr(memory, "of_child", lambda module, arguments: "1.00")
    out = tmp_path / "candidates.md"
    arguments = ["--line", "64 x 8, H4 D16 N1, float32", "--seconds", "0.01", "--threads", "1", "--out", str(out)]
    assert candidates.main(arguments) == 0
    text = out.read_text(encoding="utf-8")
    assert text.count("| 64 x 8 |") == 2
    assert "SDPA by request" in text or "requests in groups" in text or "copied keys" in text


def test_requests_and_a_stream_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CANDIDATES": 3, "_USERS": 4, "_REQUESTS": 30}.items():
        monkeypatch.setattr(requests, name, value)
    monkeypatch.setattr(memory, "of_child", lambda module, arguments: "1 MiB")  # a process for each number
    out = tmp_path / "requests.md"
    arguments = ["--line", "movielens x 2", "--seconds", "0.01", "--threads", "1", "--out", str(out)]
    assert requests.main(arguments) == 0
    text = out.read_text(encoding="utf-8")
    assert "| movielens | 2 x 3 | training step |" in text
    assert text.count("| read anew |") == text.count("| kept |") == 1


def test_a_stream_scores_the_same_with_and_without_kept_states() -> None:
    model = requests.make_model("request").eval()
    stream = requests.visits(model, None)[:12]
    _, none = requests.serve(model, stream, cached=False)
    _, hits = requests.serve(model, stream, cached=True)
    assert none == 0
    assert 0 <= hits <= 12


@pytest.mark.skipif(memory.unsupported_reason() is not None, reason="peaks are read from Linux's /proc")
def test_a_peak_holds_inputs_and_outputs_at_least() -> None:
    peak = memory.of_child("candidates", ["--peak", "64 x 8, H4 D16 N1, float32: forward+backward", "--threads", "1"])
    assert 0.9 < float(peak) < 3
