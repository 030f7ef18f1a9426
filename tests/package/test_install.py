"""Installing and importing: what a wheel and an sdist hold, and that the package stands without its optional parts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_COMPILER = {"CXX": "/nonexistent/c++"}


def python(script: str, cwd: Path | None = None, **environment: str) -> str:
    """The output of a fresh interpreter; it sees the installed packages alone, or this checkout without a `cwd`."""
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"} if cwd is None else {}
    completed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=cwd or ROOT,
        env={**os.environ, **path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


# ---------------------------------------------------------------- importing

POOLS = """
import torch, interformer_kernels as ik
k = torch.randn(7, 1, 4, requires_grad=True)
ik.pma_pooling(k[:2], k, None, torch.tensor([0, 3, 7])).sum().backward()
assert k.grad.isfinite().all()
"""


@pytest.mark.parametrize(
    "blocked", [["interformer_kernels._C"], ["triton"], ["interformer_kernels._C", "triton"]], ids=str
)
def test_works_without(blocked: list[str]) -> None:
    python(f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n{POOLS}")


def test_the_reason_for_a_missing_native_module_is_told() -> None:
    output = python(
        "import sys; sys.modules['interformer_kernels._C'] = None\n" + POOLS + "try:\n"
        "    ik.pma_pooling(k[:2], k, None, torch.tensor([0, 3, 7]), backend='cpu')\n"
        "except RuntimeError as error: print(error)"
    )
    assert "backend 'cpu' cannot serve: the native module interformer_kernels._C cannot be imported: " in output


IMPORT_COST = """
import json, sys, time
import torch
known, start = set(sys.modules), time.process_time()
import interformer_kernels
spent = time.process_time() - start
print(json.dumps([spent, sorted({name.split(".")[0] for name in set(sys.modules) - known})]))
"""


def test_importing_needs_torch_alone_and_is_quick() -> None:
    """Under 0.2 s of processor time beyond torch's own import; of other packages only what torch itself pulls in."""
    runs: list[Any] = [json.loads(python(IMPORT_COST)) for _ in range(3)]
    assert min(spent for spent, _ in runs) < 0.2
    allowed = {"interformer_kernels", "torch", "triton"}  # torch.utils.flop_counter loads Triton where it is installed
    assert {name for name in runs[0][1] if not name.startswith("_")} - allowed <= set(sys.stdlib_module_names)


# ---------------------------------------------------------------- building


def checkout_copy(to: Path) -> Path:
    """The files that git knows or would take, so that a build leaves this checkout alone."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def build(source: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m build`, by default under ordinary build isolation; else with the tools of this environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", "build", *options, str(source)],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An sdist, a wheel made of that sdist without a compiler, and the log of the build."""
    source = checkout_copy(tmp_path_factory.mktemp("source"))
    completed = build(source, "--sdist", "--wheel", **NO_COMPILER)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return source / "dist", completed.stdout + completed.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_sdist_holds_what_a_build_needs(built: tuple[Path, str]) -> None:
    (archive,) = built[0].glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for folder in ("csrc", "cmake", "interformer_kernels", "python", "bench"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES}
        assert sources - STAND_IN <= names
    assert {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


SOURCES = {".py", ".pyi", ".typed", ".cpp", ".h", ".cu", ".cuh", ".cmake", ".map", ".yaml"}
STAND_IN = {"interformer_kernels/_C.py"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_holds_every_package(built: tuple[Path, str]) -> None:
    (wheel,) = built[0].glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("interformer_kernels", ""), ("python/interformer", ""), ("bench", "interformer_bench")):
        root = ROOT / folder
        files = [*root.rglob("*.py"), *root.rglob("*.yaml")]
        inside = {path.relative_to(root).as_posix() for path in files if "results" not in path.parts}
        assert {f"{package or root.name}/{name}" for name in inside} <= names | STAND_IN
    assert {"interformer_kernels/py.typed", "interformer_kernels/_C.pyi"} <= names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "tools/"))]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_without_a_compiler(built: tuple[Path, str], tmp_path: Path) -> None:
    """The build warns that the native module is missing; the package works, and says why the module is missing."""
    dist, log = built
    assert "THE NATIVE MODULE IS NOT BUILT" in log
    (wheel,) = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    output = python(
        POOLS
        + "print(ik.__file__)\ntry:\n    import interformer_kernels._C\nexcept ImportError as error: print(error)",
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert output.startswith(str(tmp_path))
    assert "installed without its native module, since there is no working C++ compiler" in output


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"INTERFORMER_CUDA": "yes"}, 'INTERFORMER_CUDA must be auto, 0 or 1, found "yes"'),
        (
            {"INTERFORMER_CUDA": "1", "CUDACXX": "/nonexistent/nvcc"},
            "INTERFORMER_CUDA=1, but no working nvcc was found",
        ),
        ({"INTERFORMER_CUDA": "1", **NO_COMPILER}, "INTERFORMER_CUDA=1, but there is no working C++ compiler"),
    ],
    ids=["unknown value", "no nvcc", "no compiler"],
)
def test_a_build_that_cannot_be_had_fails(tmp_path: Path, environment: dict[str, str], message: str) -> None:
    completed = build(checkout_copy(tmp_path), "--wheel", "--no-isolation", **environment)
    assert completed.returncode != 0
    assert " ".join(message.split()) in " ".join((completed.stdout + completed.stderr).split())
