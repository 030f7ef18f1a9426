"""The kit for a GPU machine: made whole or not at all, used where it fits, and never over a user's build."""

from __future__ import annotations

import json
import platform
import sys
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

import pytest
from gpu_tools import ROOT, kit

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MACHINE = {"capability": [9, 0], "triton": "3.6.0"}
# A Python that answers as the GPU machine's would, builds a wheel of a few bytes, and compiles two kernels.
PYTHON = f"""#!{sys.executable}
import os, pathlib, sys, zipfile
words = sys.argv[1:]
if words[0] == "-c":
    print('{{"suffix": "{SUFFIX}", "torch": "2.11.0", "triton": "3.6.0"}}')
elif "wheel" in words:
    assert words[-1] == {str(ROOT)!r} and os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert os.environ["INTERFORMER_CUDA"] == "1"
    parts = pathlib.Path(words[words.index("-w") + 1])
    parts.mkdir(parents=True)
    with zipfile.ZipFile(parts / "some.whl", "w") as wheel:
        wheel.writestr("interformer_kernels/_C{SUFFIX}", b"module")
else:
    assert words[0].endswith("fill_triton_cache.py")
    if "FAILS" in os.environ:
        sys.exit(3)
    cache = pathlib.Path(words[words.index("--out") + 1])
    for name in ("A", "B"):
        (cache / name).mkdir(parents=True)
        (cache / name / "kernel.cubin").write_bytes(b"code" * 1000)
"""


@pytest.fixture
def kit_folder(tmp_path: Path) -> Path:
    """A kit for this very Python."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    kit.make(str(python), tmp_path / "build" / "kit")
    return tmp_path / "build" / "kit"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without a native module."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    (tmp_path / "checkout" / "interformer_kernels").mkdir(parents=True)
    return tmp_path / "checkout"


def test_it_says_what_it_is_made_for_and_of(kit_folder: Path) -> None:
    assert sorted(file.name for file in kit_folder.iterdir()) == sorted(
        [f"_C{SUFFIX}", "kit.json", "triton-cache.tar.xz"]
    )
    manifest = json.loads((kit_folder / "kit.json").read_text())
    assert manifest["suffix"] == SUFFIX
    assert manifest["processor"] == platform.machine()
    assert (manifest["capability"], manifest["torch"], manifest["triton"]) == ([9, 0], "2.11.0", "3.6.0")
    assert (manifest["native"], manifest["kernels"]) == (kit.digest("native"), kit.digest("kernels"))
    assert list(kit.contents(kit_folder))[-1] == ("  in it: 2 files, 2 kernels", 8000)
    assert [file.name for file in kit_folder.parent.iterdir()] == ["kit"]  # nothing else is left


def test_it_is_whole_or_the_old_one_stays(kit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in kit_folder.iterdir()}
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(kit.subprocess.CalledProcessError):
        kit.make(str(tmp_path / "python"), kit_folder)
    assert {file.name: file.read_bytes() for file in kit_folder.iterdir()} == before
    assert [file.name for file in kit_folder.parent.iterdir()] == ["kit"]


def test_what_fits_is_put_in_place_once(kit_folder: Path, root: Path) -> None:
    target = root / "interformer_kernels" / f"_C{SUFFIX}"
    for status in ("put in place, where there was none", "is in place"):
        (header, native, kernels), environment = kit.use(MACHINE, kit_folder, root)
        assert header == f"kit made at commit {kit.commit()}, for torch 2.11.0"
        assert native == f"native module of the kit {status}: {target}"
        assert target.read_bytes() == b"module"
        cache = Path(environment["TRITON_CACHE_DIR"])
        assert sorted(file.name for file in cache.iterdir()) == ["A", "B"]
        assert kernels == f"kernels of the kit are in {cache}"
        assert [file.name for file in (root / "build").iterdir()] == [cache.name]


def test_a_users_build_is_kept(kit_folder: Path, root: Path) -> None:
    target = root / "interformer_kernels" / f"_C{SUFFIX}"
    target.write_bytes(b"mine")
    (_, native, _), _ = kit.use(MACHINE, kit_folder, root)
    assert native == f"native module of the kit not used: there is a build already, which is kept: {target}"
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("suffix", ".cpython-399-x86_64-linux-gnu.so", "made for Python .cpython-399-x86_64-linux-gnu.so, here is "),
        ("processor", "riscv64", "made for processor riscv64, here is "),
        ("capability", [8, 0], "made for compute capability [8, 0], here is [9, 0]"),
        ("native", "other", "made for sources other, here is "),
    ],
)
def test_a_native_module_that_does_not_fit_is_not_used(
    kit_folder: Path, root: Path, key: str, value: Any, reason: str
) -> None:
    manifest = json.loads((kit_folder / "kit.json").read_text())
    (kit_folder / "kit.json").write_text(json.dumps({**manifest, key: value}))
    (_, native, _), _ = kit.use(MACHINE, kit_folder, root)
    assert native.startswith(f"native module of the kit not used: {reason}")
    assert not list((root / "interformer_kernels").iterdir())


def test_kernels_that_do_not_fit_are_not_used(kit_folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in ({**MACHINE, "triton": "3.9.0"}, {**MACHINE, "capability": [10, 0]}, {}):
        (_, _, kernels), environment = kit.use(machine, kit_folder, root)
        assert kernels.startswith("kernels of the kit not used: made for ")
        assert not environment
    monkeypatch.setattr(kit, "digest", lambda kind: "other")
    (_, _, kernels), environment = kit.use(MACHINE, kit_folder, root)
    assert kernels.endswith("; made of other sources: what has changed is compiled here")
    assert environment
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    assert kit.use(MACHINE, kit_folder, root)[0][2] == "kernels of the kit not used: TRITON_CACHE_DIR is set"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("no manifest", ["no kit in"]),
        ("half a manifest", ["the kit is damaged: "]),
        ("a list", ["the kit is damaged: "]),
        (
            "another manifest",
            ["native module of the kit not used: damaged: ", "kernels of the kit not used: damaged: "],
        ),
        ("no module", ["native module of the kit not used: damaged: ", "kernels of the kit are in "]),
        ("half an archive", ["native module of the kit put in place", "kernels of the kit not used: damaged: "]),
        ("a wrong byte", ["native module of the kit put in place", "kernels of the kit not used: damaged: "]),
        ("an archive that writes elsewhere", ["native module of", "kernels of the kit not used: damaged: "]),
    ],
)
def test_a_damaged_kit_ends_no_report(kit_folder: Path, root: Path, damage: str, expected: list[str]) -> None:
    manifest, archive = kit_folder / "kit.json", kit_folder / "triton-cache.tar.xz"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    elif damage == "a list":
        manifest.write_text("[1, 2]")
    elif damage == "another manifest":
        manifest.write_text("{}")
    elif damage == "no module":
        (kit_folder / f"_C{SUFFIX}").unlink()
    elif damage == "a wrong byte":
        packed = archive.read_bytes()
        archive.write_bytes(packed[:100] + bytes([packed[100] ^ 1]) + packed[101:])
    elif damage == "half an archive":
        archive.write_bytes(archive.read_bytes()[:60])
    else:
        with tarfile.open(archive, "w:xz") as tar:
            tar.add(manifest, "../../outside")
    messages, environment = kit.use(MACHINE, kit_folder, root)
    for line, start in zip(messages[-len(expected) :], expected, strict=True):
        assert line.startswith(start)
    assert bool(environment) == (damage == "no module")
    assert bool(list(root.glob("build/*"))) == bool(environment)
    assert not (root / "outside").exists()


def test_a_commit_without_git_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert kit.commit() == "unknown: git is not installed"
