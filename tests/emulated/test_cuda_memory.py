"""Memory requests of the emulated CUDA kernels: sectors of global memory and bank conflicts of shared memory."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import memory
import pytest
import torch
from cuda_calls import results
from memory import Counts, Traffic

from interformer_kernels import testing
from interformer_kernels.testing import Case

SECTOR = 32


def case_of(op: str, lengths: tuple[int, ...], width: int, heads: int = 2, queries: int = 2) -> Case:
    sizes = {"heads": heads, "kv_heads": heads, "head_size": width, "value_size": width, "queries": queries}
    return Case(op, "memory", lengths=lengths, tail=0, **sizes)


def counts_of(module: ModuleType, case: Case, dtype: torch.dtype) -> tuple[Counts, dict[str, Any]]:
    """Traffic of a call, forward and backward, and its inputs."""
    inputs = testing.make_inputs(case, dtype)
    return memory.counted(module, lambda: results(case.op, inputs)), inputs


# ---------------------------------------------------------------- faults that cost time alone


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    ("fault", "sectors", "stores", "wavefronts"),
    [("", 4, 4, 4), ("no padding", 4, 4, 32), ("transposed loop", 4, 32, 4)],
)
def test_a_planted_fault_shows_in_the_counts(
    emulated: ModuleType, fault: str, sectors: int, stores: int, wavefronts: int, seed: int
) -> None:
    """Rows of 128 bytes: four sectors each. A tile without padding has all of its rows in the same banks."""
    emulated.configure(seed, True)
    x, out = torch.randn(32, 32), torch.empty(32, 32)
    counts = memory.counted(emulated, lambda: emulated.transpose(fault, x, out))
    assert torch.equal(out, x.T)
    assert counts.of("transposed", "copy") == Traffic(8, 8 * 4 * sectors, 128, 4096)
    assert counts.of("transposed", "global store") == Traffic(32, 32 * stores, 128, 4096)
    assert counts.of("transposed", "matrix load") == Traffic(1, wavefronts, 4, 512)
    (place,) = [source for _, kind, source in counts.places if kind == "matrix load"]
    assert place.startswith("planted_memory.cu:")
    assert not emulated.memory_traffic()


# ---------------------------------------------------------------- the kernels

ATTENTION = [
    case_of("jagged_attention", (104, 3, 64), 64),
    case_of("jagged_attention", (104, 3, 64), 128, heads=1),
    case_of("jagged_attention", (70, 40), 32),
    case_of("pma_pooling", (104, 3, 64), 64),
    case_of("gated_cross_attention", (104, 3, 64), 64, queries=20),
]
each_case = pytest.mark.parametrize("case", ATTENTION, ids=lambda case: f"{case.op}-{case.head_size}")
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@each_case
def test_tiles_are_copied_and_loaded_without_waste(case: Case, emulated: ModuleType) -> None:
    """Every copied sector is wanted whole, and neither copies nor matrix loads meet in a bank. Only where several rows
    of less than 128 bytes are copied by one request, their padding makes it two wavefronts of one.
    """
    counts, _ = counts_of(emulated, case, torch.bfloat16)
    products = [name for name, kinds in counts.kernels.items() if "matrix load" in kinds]
    assert len(products) >= 3
    for name in products:
        for kind in ("copy", "copy store", "matrix load"):
            traffic = counts.kernels[name][kind]
            assert traffic.requests > 0
            of_short_rows = kind == "copy store" and case.head_size < 64
            assert traffic.units <= traffic.fewest * (2 if of_short_rows else 1), (name, kind)


@each_case
def test_outputs_are_written_once_in_whole_sectors(case: Case, emulated: ModuleType) -> None:
    """Outputs and statistics of the forward, and gradients, in as few sectors as their bytes take."""
    inputs = testing.make_inputs(case, torch.bfloat16)
    made: dict[str, torch.Tensor] = {}
    counts = memory.counted(emulated, lambda: made.update(results(case.op, inputs)))
    written = counts.of("attend<", "global store")
    size = made["out"].numel() * 2
    assert size <= written.bytes <= 3 * size + 4096  # `attn_out` is float32, and kept for the backward
    assert written.units <= 1.15 * written.bytes / SECTOR + written.requests / 2
    keys = counts.of("grad_keys<", "global store")
    assert keys.units <= 1.1 * keys.bytes / SECTOR + 64


def test_a_row_of_one_tile_group_is_read_once(emulated: ModuleType) -> None:
    """64 queries are the four warps of one block: its keys, values and queries are copied once."""
    counts, inputs = counts_of(emulated, case_of("jagged_attention", (64,) * 3, 64), torch.bfloat16)
    copied = counts.of("attend<", "copy")
    assert copied.bytes == sum(inputs[name].numel() * 2 for name in ("q", "k", "v"))
    assert copied.units == copied.bytes // SECTOR


def test_heads_of_odd_sizes_are_read_by_small_pieces(emulated: ModuleType) -> None:
    """A head of 33 numbers is aligned to 2 bytes: no asynchronous copies, and the counts show what that costs."""
    counts, _ = counts_of(emulated, case_of("jagged_attention", (40,), 33), torch.bfloat16)
    assert counts.of("attend<", "copy").requests == 0
    plain = counts.of("attend<", "global load")
    assert plain.units > 4 * plain.bytes / SECTOR
