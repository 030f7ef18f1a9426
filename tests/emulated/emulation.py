"""Builds the emulation of the CUDA part and installs it instead of the real one: see README.md beside this file."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pybind11

from interformer_kernels import _C, _backend

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Argument of `-fsanitize=`, e.g. address: the process must run with the sanitizer's runtime (`tools/sanitize.sh`).
SANITIZE = os.environ.get("INTERFORMER_SANITIZE", "")


def build(sanitize: str = SANITIZE) -> Path:
    """The module, rebuilt where its sources have changed; concurrent processes wait for one another."""
    tree = ROOT / "build" / "-".join(["emulated", *sanitize.split(",")] if sanitize else ["emulated"])
    tree.mkdir(parents=True, exist_ok=True)
    with (tree / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-G", "Ninja", "-S", str(HERE / "runtime"), "-B", str(tree), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        configure += [f"-DINTERFORMER_SANITIZE={sanitize}"]
        for command in (configure, ["cmake", "--build", str(tree)]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}")
    (module,) = tree.glob("interformer_emulated*.so")
    return module


def load() -> ModuleType:
    """The module, built if need be; needs cmake, ninja and a C++ compiler for x86-64."""
    assert shutil.which("cmake"), "the emulation is built by cmake, and PATH has none: pip install cmake ninja"
    spec = importlib.util.spec_from_file_location("interformer_emulated", build())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(module: ModuleType) -> None:
    """`backend="cuda"` serves tensors on the CPU, by the emulation's functions."""
    for name in (name for name in vars(module) if name.startswith("cuda_")):
        setattr(_C, name, getattr(module, name))
    _backend._DEVICES["cuda"] = "cpu"
    _backend._cuda_missing = lambda: None
