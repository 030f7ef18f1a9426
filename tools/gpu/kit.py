"""`make gpu-kit`: the native module and the compiled kernels, made here because the GPU machine would take minutes.

`kit.json` names the machine that they are made for, and the digests of their sources. A report uses the parts that fit
its machine, and says which; nothing of the user's is replaced.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu.plan import environment
from gpu.results import ROOT, files

try:
    from lzma import LZMAError
except ImportError:  # a Python without it opens no such archive
    LZMAError = OSError  # type: ignore[assignment,misc]

KIT = ROOT / "build" / "gpu-kit"
MOST_BYTES = 60 << 20
_MANIFEST, _KERNELS = "kit.json", "triton-cache.tar.xz"
_ARCHITECTURE = "9.0a"
# The sources of the native module and of the kernels.
_SOURCES = {
    "native": ("CMakeLists.txt", "setup.py", "cmake/**/*", "csrc/**/*"),
    "kernels": ("interformer_kernels/_triton/*.py", "interformer_kernels/_launch/*.py"),
}
# Prints the extension suffix of a Python, and the versions that it would run with.
_ASK = """
import importlib.metadata, json, sysconfig
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None
suffix = sysconfig.get_config_var("EXT_SUFFIX")
print(json.dumps({"suffix": suffix, "torch": version("torch"), "triton": version("triton")}))
"""


def digest(kind: str) -> str:
    """The hash of the sources of "native" or "kernels"."""
    hasher = hashlib.sha256()
    for file in sorted({file for pattern in _SOURCES[kind] for file in ROOT.glob(pattern) if file.is_file()}):
        hasher.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return hasher.hexdigest()


def commit() -> str:
    """The commit of the checkout, or the reason why it is unknown."""
    if shutil.which("git") is None:
        return "unknown: git is not installed"
    try:
        completed = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, cwd=ROOT, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return completed.stdout.strip() or "unknown: no git repository"


# ---------------------------------------------------------------- on the GPU machine


def use(machine: Mapping[str, Any], folder: Path = KIT, root: Path = ROOT) -> tuple[list[str], dict[str, str]]:
    """Put the parts that fit this machine in place; returns messages, and additions to the steps' environment."""
    try:
        kit = dict(json.loads((folder / _MANIFEST).read_text()))
    except FileNotFoundError:
        return [f"no kit in {folder}: kernels are compiled here"], {}
    except (OSError, ValueError, TypeError) as error:
        return [f"the kit is damaged: {error}"[:300]], {}
    messages = [f"kit made at commit {kit.get('commit')}, for torch {kit.get('torch')}"]
    additions: dict[str, str] = {}
    for part, function in (("native module", _use_native), ("kernels", _use_kernels)):
        try:
            message, added = function(kit, machine, folder, root)
        except (OSError, KeyError, TypeError, tarfile.TarError, EOFError, LZMAError) as error:
            message, added = f"not used: damaged: {type(error).__name__}: {error}"[:300], {}
        messages.append(f"{part} of the kit {message}")
        additions |= added
    return messages, additions


_Used = tuple[str, dict[str, str]]


def _use_native(kit: Mapping[str, Any], machine: Mapping[str, Any], folder: Path, root: Path) -> _Used:
    requirements = {
        "Python": (kit["suffix"], sysconfig.get_config_var("EXT_SUFFIX")),
        "processor": (kit["processor"], platform.machine()),
        "compute capability": (kit["capability"], machine.get("capability")),
        "sources": (kit["native"], digest("native")),
    }
    for name, (made_for, present) in requirements.items():
        if made_for != present:
            return f"not used: made for {name} {made_for}, here is {present}", {}
    source, target = folder / f"_C{kit['suffix']}", root / "interformer_kernels" / f"_C{kit['suffix']}"
    if not target.exists():
        _copy(source, target)
        return f"put in place, where there was none: {target}", {}
    if target.read_bytes() == source.read_bytes():
        return f"is in place: {target}", {}
    return f"not used: there is a build already, which is kept: {target}", {}


def _copy(source: Path, target: Path) -> None:
    with files.replacing(target) as file:
        file.write(source.read_bytes())


def _use_kernels(kit: Mapping[str, Any], machine: Mapping[str, Any], folder: Path, root: Path) -> _Used:
    for name in ("triton", "capability"):
        if kit[name] != machine.get(name):
            return f"not used: made for {name} {kit[name]}, here is {machine.get(name)}", {}
    if "TRITON_CACHE_DIR" in os.environ:
        return "not used: TRITON_CACHE_DIR is set", {}
    archive = folder / _KERNELS
    target = root / "build" / f"triton-cache-{hashlib.sha256(archive.read_bytes()).hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as unpacked, tarfile.open(archive) as tar:
            safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(unpacked, **safely)
            os.rename(unpacked, target)
            os.mkdir(unpacked)
    remark = "" if kit["kernels"] == digest("kernels") else "; made of other sources: what has changed is compiled here"
    return f"are in {target}{remark}", {"TRITON_CACHE_DIR": str(target)}


# ---------------------------------------------------------------- here


def make(python: str, folder: Path = KIT) -> None:
    """Make the kit for a Python like the GPU machine's, with that machine's torch and Triton.

    Raises CalledProcessError where a part cannot be made: a kit is whole or not there.
    """
    versions = json.loads(subprocess.run([python, "-c", _ASK], check=True, capture_output=True, text=True).stdout)
    major, minor = _ARCHITECTURE.rstrip("a").split(".")
    manifest = {
        **versions,
        "processor": platform.machine(),
        "capability": [int(major), int(minor)],
        "native": digest("native"),
        "kernels": digest("kernels"),
        "commit": commit(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole, parts = Path(scratch) / "kit", Path(scratch) / "parts"
        whole.mkdir()
        _make_native(python, parts, whole / f"_C{versions['suffix']}")
        _make_kernels(python, parts / "kernels", whole / _KERNELS)
        files.write_text(whole / _MANIFEST, files.to_json(manifest))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(whole, folder)


def _make_native(python: str, parts: Path, target: Path) -> None:
    """Build the native module as a wheel has it: under isolation, by that Python."""
    settings = {"TORCH_CUDA_ARCH_LIST": _ARCHITECTURE, "INTERFORMER_CUDA": "1"}
    command = [python, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "-w", str(parts)]
    subprocess.run([*command, str(ROOT)], check=True, env={**os.environ, **settings})
    (wheel,) = parts.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        target.write_bytes(archive.read(f"interformer_kernels/{target.name}"))


def _make_kernels(python: str, cache: Path, target: Path) -> None:
    """Compile every kernel that parity, the checks and the bench would compile."""
    command = [python, str(ROOT / "tools" / "fill_triton_cache.py"), "--out", str(cache)]
    subprocess.run(command, check=True, env=environment(os.environ))
    with tarfile.open(target, "w:xz") as archive:
        archive.add(cache, ".")


def contents(folder: Path = KIT) -> Iterator[tuple[str, int]]:
    """Its files and their bytes."""
    for file in sorted(folder.iterdir()):
        yield file.name, file.stat().st_size
    with tarfile.open(folder / _KERNELS) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        kernels = sum(member.name.endswith(".cubin") for member in members)
        yield f"  in it: {len(members)} files, {kernels} kernels", sum(member.size for member in members)


def main() -> int:
    """Make the kit and print its contents; 1 where it is too large to take along."""
    parser = argparse.ArgumentParser(prog="make gpu-kit", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="with the GPU machine's minor version, torch, Triton")
    chosen = parser.parse_args()
    try:
        make(chosen.python)
    except (OSError, subprocess.CalledProcessError, KeyError, ValueError) as error:
        print(f"make gpu-kit: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in KIT.iterdir())
    for name, part in contents():
        print(f"{part / 2**20:8.2f} MB  {name}")
    print(f"{size / 2**20:8.2f} MB  {KIT} (at most {MOST_BYTES >> 20})")
    return 0 if size <= MOST_BYTES else 1


if __name__ == "__main__":
    raise SystemExit(main())
