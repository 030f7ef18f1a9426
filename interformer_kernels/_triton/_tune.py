"""Tile sizes measured on the device at hand: for every entry of the table, the fastest of a few candidates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from interformer_kernels._calls import AttentionCall, FfnCall
from interformer_kernels._triton import _run, _tiles, attention, personalized_ffn
from interformer_kernels._triton._tiles import Tiles

Call = Callable[[], object]
_ROWS, _LONGEST, _HEADS = 512, 256, 4


def candidates(kernel: str, width: int, itemsize: int, entry: Tiles) -> Iterator[Tiles]:
    """The entry of the table, and others: tiles that hold 32 KiB of operands or less."""
    yield entry
    for queries, keys in itertools.product((16, 32, 64, 128), repeat=2):
        if (queries + keys) * width * itemsize <= 32 << 10 and (not kernel.startswith("short") or keys < queries):
            for warps, stages in ((4, 2), (8, 2)):
                yield Tiles(queries, keys, warps, stages)


def calls(kernel: str, width: int, dtype: torch.dtype, device: str) -> Call:
    """A call whose time depends on the kernel's tiles, with rows of 1 to 256 tokens, or short ones of 1 to 32."""
    rows, longest = (8 * _ROWS, _LONGEST // 8) if kernel.startswith("short") else (_ROWS, _LONGEST)
    lengths = torch.randint(1, longest + 1, (rows,), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(device)
    tokens = int(lengths.sum())

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    if kernel in ("personalized_ffn", "grad_weight"):
        x = random(tokens, width)
        ffn = FfnCall(x, random(rows, width, width), offsets, None, "identity")
        if kernel == "personalized_ffn":
            return lambda: personalized_ffn.forward(ffn, None)
        return lambda: personalized_ffn.backward(ffn, x)
    q, k, v = (random(tokens, _HEADS, width) for _ in range(3))
    call = AttentionCall("packed", q, k, v, None, offsets, None, "multiply", "sigmoid", width**-0.5, "softmax", 1.0)
    if kernel.endswith("_rope"):
        call = call._replace(
            cos=torch.ones(longest, width // 2, device=device), sin=torch.zeros(longest, width // 2, device=device)
        )

    def forward(keep_attn_out: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return attention.forward(call, None, keep_attn_out)

    if kernel.startswith("forward"):
        return forward
    _, lse, attn_out = forward(dtype != torch.float32)

    def backward() -> object:
        return attention.backward(call, q, attn_out, lse)

    return (lambda: (forward(), backward())) if kernel.startswith("short") else backward


def seconds(call: Call) -> float:
    """Median time of a call; infinite where the device cannot run it."""
    try:
        return float(triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median"))
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return float("inf")


def tune(
    device: str,
    kernels: tuple[str, ...] = tuple(_tiles.TABLE),
    most_width: int = 256,
    measure: Callable[[Call], float] = seconds,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Tiles]:
    """The fastest tiles of every entry, by the key of the entry in the file."""
    found: dict[str, Tiles] = {}
    for kernel, dtype in itertools.product(kernels, (torch.bfloat16, torch.float32)):
        entries = _tiles.entries(kernel, dtype.itemsize, _run.target_of(torch.empty(0, device=device)))
        for width, entry in ((width, entry) for width, entry in entries.items() if width <= most_width):
            key = _tiles.key(kernel, width, dtype.itemsize)
            call = calls(kernel, width, dtype, device)
            times: dict[Tiles, float] = {}
            for candidate in candidates(kernel, width, dtype.itemsize, entry):
                log(f"{key}: {candidate}")
                with _tiles.forced(key, candidate):
                    times[candidate] = times.get(candidate) or measure(call)
            found[key] = min(times, key=lambda tiles: times[tiles])
    return found


def tune_and_keep(log: Callable[[str], None]) -> tuple[dict[str, Tiles], str]:
    """Tune for the present GPU; returns the entries, and the file that now holds them."""
    with torch.no_grad():
        found = tune("cuda", log=log)
    name = _run.target_of(torch.empty(0, device="cuda")).name
    return found, str(_tiles.keep(name, found))
