"""The CPU kernels of each instruction set, in processes of their own: the choice, forks, threads, objects."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_calls import all_ops, differing, name_of, results

from interformer_kernels.testing import make_inputs

_C = pytest.importorskip("interformer_kernels._C", exc_type=ImportError)

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_size": 16, "value_size": 16}


def python(script: str, isa: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh process that finds the tests' own modules, with a forced instruction set."""
    environment = {name: x for name, x in os.environ.items() if name != "INTERFORMER_CPU_LEVEL"}
    paths = [str(Path(__file__).parents[1]), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if isa is not None:
        environment["INTERFORMER_CPU_LEVEL"] = isa
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=100
    )


# ---------------------------------------------------------------- the choice of an instruction set

GRID = """
import torch
from cpu_calls import all_ops
from every import most_draws
from interformer_kernels import _C, personalized_ffn, testing
from interformer_kernels.testing import Case
torch.set_num_threads(1)
epilogue = dict(gate="full", residual=True)
cases = all_ops((5, 0, 37, 1, 130), heads=4, kv_heads=2, head_size=16, value_size=16)
cases += all_ops((64, 33), heads=2, kv_heads=2, head_size=7, value_size=10)
cases += [Case("pma_pooling", "epilogue", **epilogue), Case("gated_cross_attention", "epilogue", **epilogue)]
cases += [Case("pma_pooling", "shared value", shared_value=True, options={"score": "gelu", "scale": 0.3})]
masks = {"window": (4, 2), "num_prefix": 2}
cases += [Case("jagged_attention", "masks", lengths=(90, 3), rope=16, options=masks, **epilogue)]
cases += [Case("jagged_attention", "score", lengths=(90, 3), options={"score": "silu", "causal": True})]
rows = 0
for case in cases:
    for dtype in (torch.float32, torch.bfloat16):
        compared = testing.compare(case, "cpu", dtype, most_draws=most_draws(8))
        rows += len(compared)
        print(*(f"BREACH {case.op} {case} {dtype} {row}\\n" for row in compared if not row.ok), end="")
def alike(a, b):
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
for dtype in (torch.float16, torch.bfloat16):
    row = torch.tensor([0, 65536])
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)[:, None]
    for outputs in (32, 37):
        weight = torch.linspace(-9, 9, outputs).exp2().to(dtype).view(1, 1, outputs)
        exact = x.float() * weight[0].float()
        out = personalized_ffn(x, weight, row, backend="cpu")
        small = torch.finfo(dtype).tiny if dtype == torch.bfloat16 else 0  # pairs of bfloat16 flush subnormal numbers
        asked = ~((x.abs() < small) | (exact.abs() < 2 * small))
        print(end="" if alike(out[asked], exact.to(dtype)[asked]) else f"BREACH rounding {dtype} {outputs}\\n")
    added = x.view(-1, 64)
    nothing = added.new_zeros(1024, 1), added.new_zeros(1, 1, 64)
    out = personalized_ffn(*nothing, row // 64, residual=added, backend="cpu")
    print(end="" if alike(out, added) else f"BREACH reading {dtype}\\n")
print(_C.build_info()["cpu_level"], rows > 100)
"""


@pytest.mark.parametrize("isa", _C.build_info()["cpu_levels"])
def test_every_isa_is_right(isa: str) -> None:
    completed = python(GRID, isa)
    assert completed.stdout == f"{isa} True\n", completed.stdout + completed.stderr


@pytest.mark.parametrize("isa", [None, ""], ids=["unset", "empty"])
def test_the_best_isa_is_chosen(isa: str | None) -> None:
    completed = python("import torch\nfrom interformer_kernels import _C\nprint(_C.build_info()['cpu_level'])", isa)
    levels = _C.build_info()["cpu_levels"]
    if levels[-1] == "avx512_bf16" and "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
        levels.pop()  # its pairs are slow on others
    assert completed.stdout.strip() == levels[-1], completed.stderr


def test_an_unknown_isa_is_an_error() -> None:
    """Every call that needs a kernel raises; the import and other functions still work."""
    script = """
import torch, interformer_kernels
from interformer_kernels import _C
assert _C.first_bad_offset(torch.tensor([0, 2]), 2) == -1
x = torch.ones(2, 1, 2)
for _ in range(2):
    for call in (
        _C.build_info,
        lambda: interformer_kernels.jagged_attention(x, x, x, torch.tensor([0, 2]), backend="cpu"),
    ):
        try:
            call()
        except ValueError as error:
            print(error)
"""
    completed = python(script, "avx3")
    expected = f"INTERFORMER_CPU_LEVEL must be one of {', '.join(_C.build_info()['cpu_levels'])}, found avx3\n"
    assert completed.stdout == 4 * expected, completed.stderr


# ---------------------------------------------------------------- forks and threads


def test_a_forked_process_does_not_hang() -> None:
    """A DataLoader's worker lacks the OpenMP threads of its parent, and runs on one thread without them."""
    script = """
import os, torch
from cpu_calls import all_ops, differing, results
from interformer_kernels.testing import make_inputs
cases = all_ops((400, *range(1, 50)), heads=4, kv_heads=2, head_size=16, value_size=16)
inputs = [make_inputs(case, torch.float32) for case in cases]
torch.set_num_threads(2)
before = [results(case.op, made) for case, made in zip(cases, inputs)]
for _ in range(2):
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        after = [results(case.op, made) for case, made in zip(cases, inputs)]
        os._exit(any(differing(a, b) for a, b in zip(before, after)))
    assert os.waitpid(child, 0)[1] == 0
print("joined")
"""
    completed = python(script)
    assert completed.stdout == "joined\n", completed.stderr


def test_workers_of_a_data_loader() -> None:
    """Workers fork from a process whose threads have run, and use the kernels in `__getitem__` and in the collation."""
    script = """
import torch
from cpu_calls import all_ops, differing, results
from interformer_kernels.testing import make_inputs
from torch.utils.data import DataLoader
cases = all_ops((400, *range(1, 50)), heads=4, kv_heads=2, head_size=16, value_size=16)
torch.set_num_threads(2)
expected = [results(case.op, make_inputs(case, torch.float32)) for case in cases]

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return len(cases)

    def __getitem__(self, i):
        assert torch.get_num_threads() == 1
        return i, results(cases[i].op, make_inputs(cases[i], torch.float32))

def collated(items):
    again = {i: results(cases[i].op, make_inputs(cases[i], torch.float32)) for i, _ in items}
    assert not any(differing(found, again[i]) for i, found in items)
    return items

seen = 0
for items in DataLoader(Items(), batch_size=2, num_workers=2, collate_fn=collated, multiprocessing_context="fork"):
    for i, found in items:
        assert not differing(found, expected[i])
        seen += 1
print(seen == len(cases))
"""
    completed = python(script)
    assert completed.stdout == "True\n", completed.stdout + completed.stderr


@pytest.mark.parametrize("threads", [1, 2])
def test_python_threads_at_once(threads: int) -> None:
    """Threads with different inputs get the results of sequential calls."""
    cases = all_ops((400, *range(1, 50)), **SIZES)
    inputs = [make_inputs(case, torch.float32, seed=seed) for seed, case in enumerate(cases)]
    expected = [results(case.op, arguments) for case, arguments in zip(cases, inputs, strict=True)]

    def repeat(order: list[int]) -> list[str]:
        torch.set_num_threads(threads)
        wrong = []
        for i in order * 2:
            actual = results(cases[i].op, inputs[i])
            wrong += [f"{name_of(cases[i])} {name}" for name in differing(actual, expected[i])]
        return wrong

    order = list(range(len(cases)))
    with ThreadPoolExecutor(3) as pool:
        for wrong in pool.map(repeat, (order, order[::-1], order[3:] + order[:3])):
            assert not wrong


# ---------------------------------------------------------------- the object of each instruction set


def isa_flags(isa: str) -> list[str]:
    """The compiler flags of CMakeLists.txt for one instruction set, but unoptimised, which keeps every function."""
    text = (ROOT / "CMakeLists.txt").read_text()
    options = re.findall(r"target_compile_options\(interformer_\$\{isa\} PRIVATE (.*?)\$\{", text)
    flags = re.findall(rf"set\({isa}_flags(.*?)\)", text)
    while flags and (name := re.search(r"\$\{(\w+)\}", flags[0])):  # flags of a smaller instruction set
        flags = [flags[0].replace(name[0], value) for value in re.findall(rf"set\({name[1]}(.*?)\)", text)]
    standard = re.findall(r"set\(CMAKE_CXX_STANDARD (\d+)\)", text)
    visibility = re.findall(r"set\(CMAKE_CXX_VISIBILITY_PRESET (\w+)\)", text)
    assert [len(matches) for matches in (options, flags, standard, visibility)] == [1, 1, 1, 1]
    common = [f"-std=c++{standard[0]}", f"-fvisibility={visibility[0]}", "-fPIC", "-DNDEBUG", "-O0"]
    return [*common, f"-DINTERFORMER_ISA={isa}", *options[0].split(), *flags[0].split()]


def merged_symbols(source: Path, to: Path, flags: list[str]) -> list[str]:
    """The symbols of a compiled source that the linker merges with those of other objects."""
    subprocess.run(["g++", *flags, "-I", ROOT / "csrc", "-c", source, "-o", to], check=True)
    listed = subprocess.run(["nm", "-C", to], check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^[0-9a-f ]{16} (\S) (.*)$", listed, re.MULTILINE)
    assert any("kKernels" in name for _, name in lines) or source.name != "table.cpp"
    return [name for kind, name in lines if kind in "WwVvu"]


needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") or not shutil.which("nm") or not (ROOT / "csrc").is_dir(),
    reason="needs g++, nm and the sources",
)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("isa", _C.build_info()["cpu_levels"])
def test_no_kernel_replaces_that_of_another_isa(isa: str, tmp_path: Path) -> None:
    """A weak function of AVX2 code, kept by the linker for all instruction sets, would crash on older processors."""
    source = ROOT / "csrc/cpu/kernels/table.cpp"
    assert merged_symbols(source, tmp_path / "kernels.o", isa_flags(isa)) == []


@needs_compiler
@pytest.mark.slow
def test_the_check_of_symbols_detects_one(tmp_path: Path) -> None:
    source = tmp_path / "weak.cpp"
    source.write_text("#include <algorithm>\nint f(int a, int b) { return std::max(a, b); }")
    assert merged_symbols(source, tmp_path / "weak.o", isa_flags("generic"))
