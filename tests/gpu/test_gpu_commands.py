"""Commands that need a GPU report its absence, and their parts that run without one are right."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from interformer_kernels.cli import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_tune_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 1
    assert capsys.readouterr().err == "interformer-kernels tune: needs a GPU that torch can use, found none\n"


def test_tuned_tiles_are_the_fastest_measured_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from interformer_kernels._triton import _run, _tiles, _tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = _tiles.Target("cuda", 90, "Some GPU/x")
    fast_tiles = _tiles.Tiles(32, 16, 4, 2)

    def measure(call: Any) -> float:
        """The time of the launches that a call records: fast with the expected tiles alone."""
        with _run.recording(target) as launches:
            call()
        return min(1.0 if launch.tiles == fast_tiles else 2.0 for launch in launches)

    best_tiles = _tune.tune("meta", ("forward", "grad_weight"), 64, measure)
    assert {key for key, tiles in best_tiles.items() if tiles == fast_tiles} == set(best_tiles)
    assert set(best_tiles) >= {"forward/64/16", "forward/64/32"}
    file = _tiles.keep(target.name, best_tiles)
    assert file.parent == tmp_path / "interformer_kernels"
    assert json.loads(file.read_text())["forward/64/16"] == list(fast_tiles[:4])
    assert _tiles.tiles("forward", 48, 2, target) == fast_tiles
    assert _tiles.tiles("forward", 48, 2, target._replace(name="")) == _tiles.TABLE["forward"][2][64]


def test_the_next_call_has_other_tiles_once_they_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A geometry is made once for many calls, but not for calls with other tiles."""
    pytest.importorskip("triton")
    from interformer_kernels._triton import _run, _tiles, _tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target, other_tiles = _tiles.Target("cuda", 90, "Another GPU"), _tiles.Tiles(32, 16, 4, 2)
    call = _tune.calls("forward", 64, torch.bfloat16, "meta")

    def taken() -> _tiles.Tiles:
        with _run.recording(target) as launches:
            call()
        return launches[0].tiles

    for _ in range(2):
        assert taken() == _tiles.tiles("forward", 64, 2, target) != other_tiles
        with _tiles.forced("forward/64/16", other_tiles):
            assert taken() == other_tiles
    _tiles.keep(target.name, {"forward/64/16": other_tiles})
    assert taken() == other_tiles


@pytest.mark.parametrize("content", ["", "{", "[]", '{"forward/64/16": [32, 16, 4, 2]}', "changed", "zero"])
def test_damaged_tuned_tiles_are_said_and_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    pytest.importorskip("triton")
    from interformer_kernels._triton import _tiles

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = _tiles.Target("cuda", 90, f"GPU {content}")
    file = _tiles.keep(target.name, {"forward/64/16": _tiles.Tiles(32, 0 if content == "zero" else 16, 4, 2)})
    if content != "zero":
        file.write_text(file.read_text().replace("16,", "61,") if content == "changed" else content)
    _tiles._tuned.cache_clear()
    for _ in range(2):
        assert _tiles.tiles("forward", 64, 2, target) == _tiles.TABLE["forward"][2][64]
    (record,) = [record for record in caplog.records if record.name == "interformer_kernels"]
    assert record.getMessage().startswith(f"{file}: damaged: ")
    assert "\n" not in record.getMessage()
    assert list(file.parent.iterdir()) == [file]
    _tiles.keep(target.name, {"forward/64/16": _tiles.Tiles(32, 16, 4, 2)})  # tuning again mends it
    assert _tiles.tiles("forward", 64, 2, target) == _tiles.Tiles(32, 16, 4, 2)


def test_the_device_is_switched_where_the_tensors_are_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device costs no switch; tensors of the CPU are for the interpreter alone."""
    pytest.importorskip("triton")
    from interformer_kernels._triton import _run

    there: Any = SimpleNamespace(is_cuda=True, get_device=lambda: 1, device=torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _run.on_device_of(there) is None
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    context: Any = _run.on_device_of(there)
    assert isinstance(context, torch.cuda.device)
    assert context.idx == 1
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        _run.on_device_of(torch.ones(1))


def test_tiles_follow_the_capability() -> None:
    """Without tensor cores 16-bit tiles are float32's; later devices change entries of the table, other kinds none."""
    pytest.importorskip("triton")
    from interformer_kernels._triton import _tiles
    from interformer_kernels._triton._tiles import Target, entries

    for kernel, of_kernel in _tiles.TABLE.items():
        if kernel.endswith("_rope"):
            continue
        assert entries(kernel, 2, Target("cuda", 75)) == of_kernel[4]
        assert entries(kernel, 4, Target("cuda", 75)) == of_kernel[4]
        assert entries(kernel, 2, Target("hip", 0)) == entries(kernel, 2, Target("cpu", 0)) == of_kernel[2]
    for capability in (75, 89, 100):  # rotary embedding is a pass of its own
        assert entries("forward_rope", 2, Target("cuda", capability)) == {}
    assert entries("short_rope", 2, Target("cuda", 90)) == {64: _tiles.TABLE["short"][2][64]}
    on_hopper = entries("short_backward_rope", 4, Target("cuda", 90))[32]
    assert on_hopper == _tiles.SINCE[90]["short_backward_rope"][4][32] != _tiles.SINCE[80]["short_backward"][4][32]
    assert entries("whole_rope", 2, Target("cuda", 90))[64].warps == 8  # four spill
    on_amd = entries("grad_queries_rope", 2, Target("hip", 0))
    assert max(on_amd) == 64 < max(entries("grad_queries", 2, Target("hip", 0)))
    changed = _tiles.SINCE[90]["grad_keys"][2][128]
    assert _tiles.tiles("grad_keys", 100, 2, Target("cuda", 100)) == changed
    assert _tiles.tiles("grad_keys", 100, 2, Target("cuda", 86)) == _tiles.TABLE["grad_keys"][2][128] != changed
    assert _tiles.tiles("grad_queries", 256, 2, Target("cuda", 90)) == _tiles.SINCE[80]["grad_queries"][2][256]
