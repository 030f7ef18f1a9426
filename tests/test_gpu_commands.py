"""What needs a GPU says so without one, and what of it can be tried without one is right."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from interformer_kernels.cli import main

ROOT = Path(__file__).parents[1]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def load_gpu_report() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "tools" / "gpu_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_no_gpu
def test_tune_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 1
    assert capsys.readouterr().err == "interformer-kernels tune: needs a GPU that torch can use, found none\n"


@needs_no_gpu
def test_gpu_report_says_that_it_needs_a_gpu() -> None:
    done = subprocess.run([sys.executable, "tools/gpu_report.py"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "make gpu-report: needs a GPU that torch can use, found none\n"


def test_tuned_tiles_are_the_fastest_measured_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from interformer_kernels._triton import _run, _tiles, _tune

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = _tiles.Target("cuda", 90, "Some GPU/x")
    wanted = _tiles.Tiles(32, 16, 4, 2)

    def measure(call: Any) -> float:
        """Of what would be started: fast with the wanted tiles alone."""
        with _run.written_down(target) as launches:
            call()
        return min(1.0 if launch.tiles == wanted else 2.0 for launch in launches)

    found = _tune.tune("meta", ("forward", "grad_weight"), 64, measure)
    assert {key for key, tiles in found.items() if tiles == wanted} == set(found)
    assert set(found) >= {"forward/64/16", "forward/64/32"}
    file = _tiles.keep(target.name, found)
    assert file.parent == tmp_path / "interformer_kernels"
    assert json.loads(file.read_text())["forward/64/16"] == list(wanted)
    assert _tiles.tiles("forward", 48, 2, target) == wanted
    assert _tiles.tiles("forward", 48, 2, target._replace(name="")) == _tiles.TABLE["forward"][2][64]


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


def test_tiles_follow_the_capability() -> None:
    """Without tensor cores 16-bit tiles are float32's; later devices change entries of the table, other kinds none."""
    pytest.importorskip("triton")
    from interformer_kernels._triton import _tiles
    from interformer_kernels._triton._tiles import Target, entries

    for kernel, of_kernel in _tiles.TABLE.items():
        assert entries(kernel, 2, Target("cuda", 75)) == of_kernel[4]
        assert entries(kernel, 4, Target("cuda", 75)) == of_kernel[4]
        assert entries(kernel, 2, Target("hip", 0)) == entries(kernel, 2, Target("cpu", 0)) == of_kernel[2]
    changed = _tiles.SINCE[90]["grad_keys"][2][128]
    assert _tiles.tiles("grad_keys", 100, 2, Target("cuda", 100)) == changed
    assert _tiles.tiles("grad_keys", 100, 2, Target("cuda", 86)) == _tiles.TABLE["grad_keys"][2][128] != changed
    assert _tiles.tiles("grad_queries", 256, 2, Target("cuda", 90)) == _tiles.SINCE[80]["grad_queries"][2][256]


def test_every_backend_gets_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_gpu_report()
    commands: dict[str, list[str]] = {}
    limits: dict[str, float] = {}

    def stage(name: str, command: list[str], limit: float) -> dict[str, Any]:
        commands[name], limits[name] = command, limit
        return {"status": 0}

    monkeypatch.setattr(module, "stage", stage)
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    for backend in module.TOOLS:
        assert set(module.stages_of(backend, None, 0.5)) >= {f"first calls, {backend}", f"bench, {backend}"}
    assert sum(limits.values()) <= sum(module.LIMITS.values()) - module.LIMITS["build"] - module.LIMITS["parity"]
    assert sum(module.LIMITS.values()) <= 600
    assert commands["racecheck-cuda"][:3] == ["compute-sanitizer", "--tool", "racecheck"]
    assert commands["bench-cuda"].count("cuda") == 2


def test_the_report_is_written_whatever_stages_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_gpu_report()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "OUT", tmp_path / "out")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    cut = module.stage("bench", command, 2)
    assert cut["status"] == "out of time"
    failed = module.stage("build", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60)
    assert (failed["status"], failed["last"]) == (3, ["why"])
    about = {"gpu": "Some GPU (x)", "torch": "2", "triton": "3", "cuda": "13", "python": "3", "commit": "c"}
    parity = {"triton, pma_pooling, float32": {"status": 0, "seconds": 1.0, "last": [], "compared": 7, "breaches": []}}
    first = {"status": 0, "seconds": 1.0, "last": ["pma_pooling: 7.0 ms"]}
    stages = {"build": failed, "bench, triton": cut, "first calls, triton": first}
    files = module.write({**about, "backends": ["triton"], **stages, "parity": parity})
    assert [file.name for file in files] == ["some-gpu-x.json", "some-gpu-x.md"]
    text = files[1].read_text()
    assert "| build | 3 |" in text
    assert "| bench, triton | out of time |" in text
    assert "- pma_pooling: 7.0 ms" in text
    assert "| parity, triton, pma_pooling, float32 | 0; 7 compared, 0 breaches |" in text
    assert json.loads(files[0].read_text())["measured"] == {"triton": None}
