"""Registers, spills, shared memory and main loops of every Triton kernel, compiled ahead of time, without a device.

`PYTHONPATH=tools python -m resources.triton_kernels`, or `make resources`; `--json` for tests. The launches that are
compiled are those that the launchers record for these calls, argument by argument.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from interformer_kernels._calls import AttentionCall, FfnCall, RotaryCall, SoftmaxCall, WeightedSumCall
from interformer_kernels._cli.arguments import count
from interformer_kernels._cli.tables import print_table, status_line
from interformer_kernels._triton import (
    _run,
    apply_rotary,
    attention,
    jagged_softmax,
    jagged_weighted_sum,
    personalized_ffn,
)
from interformer_kernels._triton._run import Launch
from interformer_kernels._triton._tiles import Target
from resources import loop_record
from resources.machine_code import LANES, dump, main_loop

TARGETS = {
    "sm_80": (Target("cuda", 80), GPUTarget("cuda", 80, 32)),
    "sm_90": (Target("cuda", 90), GPUTarget("cuda", 90, 32)),
    "sm_100": (Target("cuda", 100), GPUTarget("cuda", 100, 32)),
    "gfx942": (Target("hip", 0), GPUTarget("hip", "gfx942", 64)),
}
# Bytes of shared memory that a program may have.
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Kernels whose main loop makes one tile of scores a step.
SCORE_LOOPS = frozenset({"attention_forward", "attention_grad_queries", "attention_grad_keys"})
WIDTHS = (16, 32, 64, 128, 256)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclasses.dataclass(frozen=True)
class Usage:
    """Resources of one kernel on one device: registers and spilled bytes of a thread, bytes of shared memory of a
    program; on NVIDIA devices the instructions of its main loop, and of a score where that loop makes tiles of scores.
    """

    call: str
    kernel: str
    width: int
    dtype: str
    target: str
    tiles: str
    registers: int
    spills: int
    shared: int
    loop: int = 0
    per_score: float = 0.0

    @property
    def fits(self) -> bool:
        """No spills, and no more shared memory than a program may have."""
        return self.spills == 0 and self.shared <= SHARED_MEMORY[self.target]


# ---------------------------------------------------------------- the calls


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _table(width: int) -> Tensor:
    return _meta(512, width // 2, dtype=torch.float32)


_MAPS = ("multiply", "sigmoid", 0.125, "softmax", 1.0)


def _jagged(width: int, dtype: torch.dtype) -> None:
    """Self attention under a causal window, gated."""
    x, offsets = _meta(4096, 4, width, dtype=dtype), _meta(129, dtype=torch.int64)
    call = AttentionCall("packed", x, x, x, None, offsets, x, *_MAPS)
    call = call._replace(causal=True, window_left=64)
    out, lse, attn_out = attention.forward(call, x, True)
    attention.backward(call, out, attn_out, lse)


def _rotated(width: int, dtype: torch.dtype) -> None:
    """Self attention, all channels rotated; wide heads by passes of their own."""
    x, offsets, table = _meta(4096, 4, width, dtype=dtype), _meta(129, dtype=torch.int64), _table(width)
    call = AttentionCall("packed", x, x, x, None, offsets, None, *_MAPS)._replace(cos=table, sin=table)
    out, lse, attn_out = attention.forward(call, None, dtype != torch.float32)
    attention.backward(call, out, attn_out, lse)


def _pooling(width: int, dtype: torch.dtype) -> None:
    """Two seeds under four heads, keys as values."""
    seeds, k = _meta(2, 4, width, dtype=dtype), _meta(4096, 4, width, dtype=dtype)
    offsets = _meta(129, dtype=torch.int64)
    call = AttentionCall("shared", seeds, k, None, None, offsets, None, *_MAPS)
    out, lse, attn_out = attention.forward(call, None, dtype != torch.float32)
    attention.backward(call, out, attn_out, lse)


def _crossed(width: int, dtype: torch.dtype) -> None:
    """32 dense queries, the score silu, gated."""
    q, k = _meta(128, 32, 4, width, dtype=dtype), _meta(4096, 4, width, dtype=dtype)
    offsets = _meta(129, dtype=torch.int64)
    options = "self", "tanh", 0.125, "silu", 0.5
    call = AttentionCall("dense", q, k, k, None, offsets, q, *options)
    out, lse, attn_out = attention.forward(call, q, True)
    attention.backward(call, out, attn_out, lse)


def _many_rows(width: int, dtype: torch.dtype) -> None:
    """Self attention of so many rows that their tiles are listed."""
    x, offsets = _meta(65536, 4, width, dtype=dtype), _meta(4097, dtype=torch.int64)
    call = AttentionCall("packed", x, x, x, None, offsets, None, *_MAPS)
    out, lse, attn_out = attention.forward(call, None, dtype != torch.float32)
    attention.backward(call, out, attn_out, lse)


def _lse_gradient(width: int, dtype: torch.dtype) -> None:
    """The backward of self attention where the log-sum-exp has a gradient."""
    x, offsets = _meta(4096, 4, width, dtype=dtype), _meta(129, dtype=torch.int64)
    call = AttentionCall("packed", x, x, x, None, offsets, None, *_MAPS)
    lse = _meta(4096, 4, dtype=torch.float32)
    attn_out = _meta(*((0,) if dtype == torch.float32 else (4096, 4, width)), dtype=torch.float32)
    attention.backward(call, x, attn_out, lse, lse)


def _targets(width: int, dtype: torch.dtype) -> None:
    """Self attention with targets, under a causal window from which the last queries are free, and a prefix."""
    x, offsets = _meta(4096, 4, width, dtype=dtype), _meta(129, dtype=torch.int64)
    call = AttentionCall("packed", x, x, x, None, offsets, None, *_MAPS)._replace(causal=True, window_left=64)
    call = call._replace(num_prefix=4, prefix="index", full_tail=8, num_targets=_meta(128, dtype=torch.int64))
    out, lse, attn_out = attention.forward(call, None, dtype != torch.float32)
    attention.backward(call, out, attn_out, lse)


def _capped(width: int, dtype: torch.dtype) -> None:
    """Self attention with a softcap and sinks."""
    x, offsets = _meta(4096, 4, width, dtype=dtype), _meta(129, dtype=torch.int64)
    call = AttentionCall("packed", x, x, x, None, offsets, None, *_MAPS)
    call = call._replace(causal=True, softcap=30.0, sinks=_meta(4, dtype=torch.float32))
    out, lse, attn_out = attention.forward(call, None, dtype != torch.float32)
    attention.backward(call, out, attn_out, lse)


def _dropout(width: int, dtype: torch.dtype) -> None:
    """Self attention whose weights are dropped, and pooling, where heads share a tile."""
    x, offsets, seed = _meta(4096, 4, width, dtype=dtype), _meta(129, dtype=torch.int64), _meta(dtype=torch.int64)
    dropped = {"dropout_p": 0.1, "dropout_seed": seed}
    for q, layout in ((x, "packed"), (x[:2], "shared")):
        call = AttentionCall(layout, q, x, x, None, offsets, None, *_MAPS)._replace(**dropped)
        out, lse, attn_out = attention.forward(call, None, dtype != torch.float32)
        attention.backward(call, out, attn_out, lse)


def _biases(width: int, dtype: torch.dtype) -> None:
    """Self attention with biases by position and by time."""
    x, times = _meta(4096, 4, width, dtype=dtype), _meta(4096, dtype=torch.int64)
    offsets = _meta(129, dtype=torch.int64)
    call = AttentionCall("packed", x, x, x, None, offsets, None, *_MAPS)._replace(causal=True)
    call = call._replace(position_bias=_meta(4, 401, dtype=torch.float32), time_bias=_meta(4, 64, dtype=torch.float32))
    call = call._replace(times_q=times, times_k=times, time_edges=_meta(63, dtype=torch.int64))
    out, lse, attn_out = attention.forward(call, None, dtype != torch.float32)
    attention.backward(call, out, attn_out, lse)


def _rotary(width: int, dtype: torch.dtype) -> None:
    """All channels rotated."""
    x, table = _meta(4096, 4, width, dtype=dtype), _table(width)
    apply_rotary.forward(RotaryCall(x, _meta(129, dtype=torch.int64), table, table, None, False))


def _feed_forward(width: int, dtype: torch.dtype) -> None:
    """With a bias, a residual and gelu."""
    x, weight = _meta(4096, width, dtype=dtype), _meta(128, width, width, dtype=dtype)
    bias, offsets = _meta(128, width, dtype=dtype), _meta(129, dtype=torch.int64)
    call = FfnCall(x, weight, offsets, bias, "gelu")
    personalized_ffn.backward(call, personalized_ffn.forward(call, x))


def _own_scores(width: int, dtype: torch.dtype) -> None:
    """Weights of four heads from scores, and sums with them."""
    scores, v, offsets = _meta(4096, 4, dtype=dtype), _meta(4096, 4, width, dtype=dtype), _meta(129, dtype=torch.int64)
    call = SoftmaxCall(scores, offsets)
    weights = jagged_softmax.forward(call)
    jagged_softmax.backward(call, weights)
    summed = WeightedSumCall(weights, v, offsets)
    jagged_weighted_sum.backward(summed, jagged_weighted_sum.forward(summed))


CALLS: dict[str, Callable[[int, torch.dtype], None]] = {
    "jagged_attention": _jagged,
    "many_rows": _many_rows,
    "rotary_attention": _rotated,
    "pma_pooling": _pooling,
    "gated_cross_attention": _crossed,
    "apply_rotary": _rotary,
    "personalized_ffn": _feed_forward,
    "own_scores": _own_scores,
    "lse_gradient": _lse_gradient,
    "targets": _targets,
    "softcap_sinks": _capped,
    "dropout": _dropout,
    "biases": _biases,
}


# ---------------------------------------------------------------- compiling


_Paths = dict[tuple[int, ...], Any]


def _described(value: Any, path: tuple[int, ...], constants: _Paths, attributes: _Paths, special: bool) -> Any:
    """The type of an argument as Triton's launch path specialises it: a string, or a tuple of the same class with the
    types of its members. Constants and attributes are entered by their path among the arguments.
    """
    if isinstance(value, tuple):
        # `do_not_specialize` does not reach the members of tuples.
        members = [_described(x, (*path, i), constants, attributes, True) for i, x in enumerate(value)]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    if value is None or (special and type(value) is int and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor) or (special and type(value) is int and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def source_of(launch: Launch) -> ASTSource:
    """The kernel as it would be specialised for this launch."""
    signature: dict[str, Any] = {}
    constants: _Paths = {}
    attributes: _Paths = {}
    for i, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", launch.constants[parameter.name]
        else:
            special = not parameter.do_not_specialize
            signature[parameter.name] = _described(launch.arguments[i], (i,), constants, attributes, special)
    return ASTSource(launch.kernel, signature, constants, attributes)


def usage_on_nvidia(compiled: Any, target: GPUTarget) -> tuple[int, int, int]:
    """Registers, bytes of spills, and instructions of the main loop of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        ((_, code),) = dump(cubin)
        loop = main_loop(code)
        return *usage_of_cubin(cubin, ptx, target.arch), 0 if loop is None else loop.instructions


def usage_of_cubin(cubin: Path, ptx: Path, arch: int) -> tuple[int, int]:
    """Registers, and bytes of spills, of a kernel's binary that was assembled from this PTX."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    output = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", output)
    if match is None:
        raise RuntimeError(f"cuobjdump reports no registers: {output}")
    # A stack frame need not hold spills; the assembler reports those alone.
    return int(match[1]), _spills(ptx, arch) if int(match[2]) else 0


def _spills(ptx: Path, arch: int) -> int:
    name = f"sm_{arch}" + ("a" if arch >= 90 else "")
    command = [get_ptxas(arch).path, "-v", f"--gpu-name={name}", ptx, "-o", "/dev/null"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return max(int(size) for size in re.findall(r"(\d+) bytes spill stores", output))


def _usage_on_amd(compiled: Any) -> tuple[int, int, int]:
    def number(field: str) -> int:
        match = re.search(rf"\.{field}:\s*(\d+)", compiled.asm["amdgcn"])
        if match is None:
            raise RuntimeError(f"the assembly has no .{field}")
        return int(match[1])

    return number("vgpr_count"), number("private_segment_fixed_size"), 0


def usage(call: str, width: int, dtype: str, target: str) -> list[Usage]:
    """Compile the kernels that a call launches."""
    of_call = []
    device, compiler = TARGETS[target]
    with _run.recording(device) as launches:
        CALLS[call](width, DTYPES[dtype])
    for launch in launches:
        compiled = triton.compile(source_of(launch), target=compiler, options=launch.tiles.options)
        on_device = _usage_on_amd(compiled) if device.kind == "hip" else usage_on_nvidia(compiled, compiler)
        registers, spills, loop = on_device
        name, chosen = launch.kernel.fn.__name__, launch.tiles
        tiles = f"{chosen.queries}x{chosen.keys}, {chosen.warps} warps, {chosen.stages} stages"
        scores = chosen.queries * chosen.keys if name in SCORE_LOOPS else 0
        per_score = round(loop * chosen.warps * LANES / scores, 1) if scores else 0.0
        shared = compiled.metadata.shared
        of_call.append(Usage(call, name, width, dtype, target, tiles, registers, spills, shared, loop, per_score))
    return of_call


def usages(entries: Sequence[tuple[str, int, str, str]], jobs: int) -> Iterator[list[Usage]]:
    """`usage` of each entry, in order, `jobs` at once: compiling a kernel is single-threaded."""
    # A forked process would inherit locks of the threads that torch and LLVM have started.
    with ProcessPoolExecutor(min(jobs, len(entries)), multiprocessing.get_context("spawn")) as pool:
        for entry, of_entry in zip(entries, pool.map(usage, *zip(*entries, strict=True)), strict=True):
            status_line(", ".join(map(str, entry)))
            yield of_entry
    status_line("")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 1 where a kernel does not fit, or its main loop has grown by more than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--call", action="append", choices=tuple(CALLS))
    parser.add_argument("--width", action="append", type=int, help="channels of a head")
    parser.add_argument("--dtype", action="append", choices=tuple(DTYPES))
    parser.add_argument("--target", action="append", choices=tuple(TARGETS))
    parser.add_argument(
        "--entry", action="append", metavar="CALL/WIDTH/DTYPE/TARGET", help="just these; may be repeated"
    )
    parser.add_argument("--every", type=count, default=1, metavar="N", help="of all these, the first of every N")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile at once")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each kernel")
    parser.add_argument("--record", action="store_true", help=f"record the main loops of {loop_record.TARGET}")
    chosen = parser.parse_args(arguments)
    axes = (
        chosen.call or list(CALLS),
        chosen.width or WIDTHS,
        chosen.dtype or DTYPES,
        chosen.target or TARGETS,
    )
    requested = [entry.split("/") for entry in chosen.entry] if chosen.entry else itertools.product(*axes)
    entries = [(call, int(width), dtype, target) for call, width, dtype, target in requested][:: chosen.every]
    table: list[Usage] = []
    for of_entry in usages(entries, chosen.jobs):
        table += of_entry
        if chosen.json:
            for row in of_entry:
                print(json.dumps({**dataclasses.asdict(row), "fits": row.fits}), flush=True)
    if not chosen.json:
        _show(table)
    loops = _recordable(table)
    if chosen.record:
        loop_record.write(loops)
    grown = loop_record.rises(loops, loop_record.recorded())
    for line in grown:
        print(line, file=sys.stderr)
    return 0 if all(row.fits for row in table) and not grown else 1


def _recordable(table: Sequence[Usage]) -> dict[str, int]:
    """The main loops of the recorded target by name; a kernel that a call launches twice is numbered."""
    loops: dict[str, int] = {}
    launches: collections.Counter[str] = collections.Counter()
    for row in table:
        name = f"{row.call}/{row.width}/{row.dtype}/{row.kernel}"
        if row.target == loop_record.TARGET and row.loop:
            loops[f"{name}#{launches[name]}"] = row.loop
            launches[name] += 1
    return loops


def _show(table: Sequence[Usage]) -> None:
    columns = (
        *("call", "kernel", "width", "dtype", "tiles", "target", "registers", "spills", "shared"),
        *("main loop", "per score", ""),
    )
    lines = [
        (
            row.call,
            row.kernel,
            str(row.width),
            row.dtype,
            row.tiles,
            row.target,
            str(row.registers),
            str(row.spills),
            str(row.shared),
            str(row.loop or ""),
            str(row.per_score or ""),
            "ok" if row.fits else "DOES NOT FIT",
        )
        for row in table
    ]
    print_table("Resources of the Triton kernels, compiled ahead of time", columns, lines)
    print(f"{len(table)} kernels, {sum(not row.fits for row in table)} do not fit")


if __name__ == "__main__":
    sys.exit(main())
