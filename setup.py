"""Builds the native module `interformer_kernels._C` with CMake and Ninja; everything static is in pyproject.toml.

`INTERFORMER_CUDA` chooses its CUDA part: `auto` (the default: where nvcc is found), `1` (required) or `0` (left out).
`INTERFORMER_SANITIZE` is what `-fsanitize=` gets: see `tools/sanitize.sh`.
Without a C++ compiler the package is installed without the module, and `_C` becomes a file that says so when imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STAND_IN = '''"""Stands where the native module would be."""

raise ImportError({reason!r})
'''
BANNER = """
{line}
interformer_kernels: THE NATIVE MODULE IS NOT BUILT
{reason}
{line}
"""


class FreshBuild(build):
    """Leaves out what an earlier build put in the tree that wheels are made of and the sources no longer have."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures and builds the one extension, next to its package for an editable install."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in (target, stand_in(target)):
            stale.unlink(missing_ok=True)
        tree = self._build_tree()
        self._configure(tree, target.name)
        reason_file = tree / "no_native_module.txt"
        if not reason_file.exists():
            subprocess.run([cmake(), "--build", str(tree)], check=True)
            shutil.copy2(tree / target.name, target)
            return
        reason = reason_file.read_text().strip()
        print(BANNER.format(line="!" * 100, reason=reason), file=sys.stderr, flush=True)
        stand_in(target).write_text(STAND_IN.format(reason=reason))

    def copy_extensions_to_source(self) -> None:
        """An editable install gets what was built, and loses what an earlier one left and this one did not build."""
        super().copy_extensions_to_source()
        for built_module, module in self.get_output_mapping().items():
            for built, here in ((built_module, module), (stand_in(built_module), stand_in(module))):
                Path(here).unlink(missing_ok=True)
                if Path(built).exists():
                    self.copy_file(str(built), str(here))

    def get_outputs(self) -> list[str]:
        """The module that was built, or the file that stands in for it."""
        outputs = map(Path, super().get_outputs())
        return [str(output if output.exists() else stand_in(output)) for output in outputs]

    def _build_tree(self) -> Path:
        """A build tree made by the same tools, or a fresh one: its cache holds paths into the build environment,
        which under build isolation is gone at the next install. Wheels and editable installs share it, so it is not in
        `build_temp`, which an editable install deletes."""
        tree = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        stamp = tree / "tools.txt"
        tools = "\n".join((sys.executable, cmake(), ninja(), pybind11_directory()))
        if not stamp.exists() or stamp.read_text() != tools:
            shutil.rmtree(tree, ignore_errors=True)
            tree.mkdir(parents=True)
            stamp.write_text(tools)
        return tree

    def _configure(self, tree: Path, module: str) -> None:
        subprocess.run(
            [
                cmake(),
                "-G",
                "Ninja",
                f"-S{ROOT}",
                f"-B{tree}",
                f"-DCMAKE_MAKE_PROGRAM={ninja()}",
                f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11_directory()}",
                f"-DINTERFORMER_CUDA={os.environ.get('INTERFORMER_CUDA', 'auto')}",
                f"-DINTERFORMER_WIDE_LEVEL={os.environ.get('INTERFORMER_WIDE_LEVEL', '0')}",
                f"-DINTERFORMER_SANITIZE={os.environ.get('INTERFORMER_SANITIZE', '')}",
                f"-DINTERFORMER_OUTPUT_NAME={module}",
            ],
            check=True,
        )


def stand_in(module: str | Path) -> Path:
    """The Python file that takes the native module's place where it cannot be built."""
    return Path(module).parent / "_C.py"


def cmake() -> str:
    return program("cmake")


def ninja() -> str:
    return program("ninja")


def program(name: str) -> str:
    """A build tool; PATH comes first, since an isolated build puts the one it installed there."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit(f"building interformer_kernels needs {name}, and PATH has none: pip install {name}")
    return found


def pybind11_directory() -> str:
    import pybind11

    return pybind11.get_cmake_dir()


def packages() -> dict[str, str]:
    """Every import package and its folder: three roots, of which `bench` is renamed."""
    found = {name: name.replace(".", "/") for name in find_packages(str(ROOT), include=["interformer_kernels*"])}
    found |= {name: f"python/{name.replace('.', '/')}" for name in find_packages(str(ROOT / "python"))}
    if (ROOT / "bench/__init__.py").exists():
        inner = {
            f"interformer_bench.{name}": f"bench/{name.replace('.', '/')}"
            for name in find_packages(str(ROOT / "bench"))
        }
        found |= {"interformer_bench": "bench", **inner}
    return found


setup(
    packages=list(packages()),
    package_dir=packages(),
    ext_modules=[Extension("interformer_kernels._C", sources=[], optional=True)],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)
