"""Libraries without content in place of CUDA's, so that PyTorch's CUDA build is imported where CUDA is not.

`python tools/stub_cuda_libraries.py`, with the Python whose torch it is for: a wheel of PyTorch for CUDA, installed
without its dependencies on NVIDIA's packages of gigabytes. Each library that torch's own are linked against gets a stub
beside them, with its name, its symbols and their versions. Every function answers that there is no device, so
`torch.cuda.is_available()` is False, and the CPU's part of that build works as it is.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

# The library of a symbol without version, by the prefix of its name: the first that fits. The driver's come last.
PREFIXES = {
    "cublasLt": "libcublasLt", "cublas": "libcublas", "cudnn": "libcudnn", "cufft": "libcufft",
    "curand": "libcurand", "cusolver": "libcusolver", "cusparseLt": "libcusparseLt", "cusparse": "libcusparse",
    "nccl": "libnccl", "nvrtc": "libnvrtc", "cuFile": "libcufile", "nvshmem": "libnvshmem_host", "cuda": "libcudart",
    "cu": "libcuda",
}  # fmt: skip
NO_DEVICE = 100  # cudaErrorNoDevice, and the driver's CUDA_ERROR_NO_DEVICE


def output_lines(*command: str) -> list[str]:
    """The lines that a tool prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def is_cudas(library: str) -> bool:
    """Whether a library is NVIDIA's, by its name."""
    return library.split(".so")[0] in PREFIXES.values()


def needed(libraries: list[Path]) -> set[str]:
    """Names of NVIDIA's libraries that these are linked against."""
    entries = (
        re.search(r"NEEDED.*\[(.+)\]", line)
        for library in libraries
        for line in output_lines("readelf", "-dW", library)
    )
    return {entry[1] for entry in entries if entry and is_cudas(entry[1])}


def versions(library: Path) -> Iterator[tuple[str, str]]:
    """Pairs of a library of NVIDIA's and a version of its symbols that this library needs."""
    file = ""
    for line in output_lines("readelf", "-VW", library):
        if match := re.search(r"File: (\S+)", line):
            file = match[1]
        if (match := re.search(r"Name: (\S+)\s+Flags", line)) and is_cudas(file):
            yield file, match[1]


def needed_symbols(libraries: list[Path], stubs: set[str]) -> dict[str, dict[str, set[str]]]:
    """The names of the functions that libraries need, by stub and version ("" where symbols have none)."""
    files = {stub.split(".so")[0]: stub for stub in stubs}
    symbols: dict[str, dict[str, set[str]]] = {stub: defaultdict(set) for stub in stubs}
    for library in libraries:
        file_of = {version: file for file, version in versions(library)}
        for line in output_lines("nm", "-D", "--undefined-only", library):
            name, _, version = line.split()[-1].partition("@")
            version = version.lstrip("@")
            if version:
                if version in file_of:
                    symbols[file_of[version]][version].add(name)
                continue
            owner = next((file for prefix, file in PREFIXES.items() if re.match(prefix + "[A-Z_]", name)), None)
            if owner in files:
                symbols[files[owner]][""].add(name)
    return symbols


def build(folder: Path, stub: str, symbols: dict[str, set[str]]) -> None:
    """Compile one stub."""
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch) / "stub.c", Path(scratch) / "stub.map"
        names = sorted(set().union(*symbols.values()))
        source.write_text("".join(map(_function, names)) or "int nothing;\n")
        blocks = (
            f"{version} {{ global: {'; '.join(sorted(symbols[version]))}; }};\n" for version in symbols if version
        )
        script.write_text("".join(blocks))
        command = ["gcc", "-shared", "-fPIC", "-w", "-o", folder / stub, source, f"-Wl,-soname,{stub}"]
        if script.stat().st_size:
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)


def _function(name: str) -> str:
    if re.search(r"Get\w*(String|Name)$", name):
        return f'const char* {name}(void) {{ return "a stub stands in place of CUDA"; }}\n'
    return f"int {name}(void) {{ return {NO_DEVICE}; }}\n"


def main() -> int:
    """Build all stubs, and import torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        print("stub_cuda_libraries: needs torch, which this Python does not have", file=sys.stderr)
        return 2
    folder = Path(spec.origin).parent / "lib"
    libraries = [library for library in folder.glob("*.so*") if not is_cudas(library.name)]
    stubs = needed(libraries)
    for stub, symbols in needed_symbols(libraries, stubs).items():
        build(folder, stub, symbols)
    subprocess.run([sys.executable, "-c", "import torch; assert not torch.cuda.is_available()"], check=True)
    print(f"{len(stubs)} stubs of CUDA's libraries in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
