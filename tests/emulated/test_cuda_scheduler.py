"""Persistent blocks and their tile scheduler: the number of blocks changes no bit, and long rows come first."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_calls import results
from guards import guarded_inputs

from interformer_kernels import _C
from interformer_kernels.testing import Case

ONE = {"heads": 2, "kv_heads": 1, "head_size": 8, "value_size": 8}
SHORT = (3, 0, 5, 1) * 8
CASES = [
    Case("jagged_attention", "long last", **ONE, lengths=(*SHORT, 300), gate="full", options={"causal": True}),
    Case("jagged_attention", "two long", **ONE, lengths=(200, *SHORT, 150, *SHORT), tail=40),
    Case("jagged_attention", "own queries", **ONE, lengths=(*SHORT, 90), query_lengths=(200, *SHORT)),
    Case("jagged_attention", "wide", heads=1, kv_heads=1, head_size=256, value_size=200, lengths=(70, *SHORT[:8])),
    Case("gated_cross_attention", "dense", **ONE, lengths=(*SHORT, 90), queries=20),
    Case("pma_pooling", "seeds", **ONE, lengths=(*SHORT, 90), queries=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}, {case.name}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "tf32"])
def test_bits_do_not_depend_on_how_many_blocks_there_are(
    case: Case, dtype: torch.dtype, emulated: ModuleType, tf32: None
) -> None:
    """One block does everything; a few share the work; every item has a block, and none is claimed."""
    inputs = guarded_inputs(case, dtype)
    emulated.configure(0, True, resident=1)
    alone = results(case.op, inputs)
    for seed, resident in ((1, 1), (2, 2), (3, 7), (0, 100_000)):
        emulated.configure(seed, seed == 0, resident=resident)
        for name, x in results(case.op, inputs).items():
            assert torch.equal(x, alone[name]), (name, resident)


@pytest.fixture
def schedulers(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The memory of each call's tile scheduler, as its last launch leaves it."""
    memories = []
    for name in ("cuda_attention_forward", "cuda_attention_backward"):
        native = getattr(_C, name)

        def spied(*arguments: Any, native: Any = native) -> None:
            native(*arguments)
            memories.append(arguments[-2].scheduler)

        monkeypatch.setattr(_C, name, spied)
    return memories


def test_long_rows_go_first(schedulers: list[torch.Tensor]) -> None:
    """Two rows are long: more than 4 times the mean. Every item but the first of a tile group is claimed."""
    lengths = (*SHORT, 130, *SHORT, 70)
    case = Case("jagged_attention", "", **ONE, lengths=lengths, tail=9)
    results(case.op, guarded_inputs(case, torch.bfloat16))
    # Tiles of 16 queries under the two heads, and of 16 keys.
    first = [-(-130 // 8) + -(-70 // 8), -(-130 // 16) + -(-70 // 16)]
    tokens, rows, groups = sum(lengths) + 9, len(lengths), 2 * 4
    slots = [tokens // 8 + rows + 1, tokens // 16 + rows + 1]
    assert [int(scheduler[-1]) for scheduler in schedulers] == first
    assert [int(scheduler[0]) for scheduler in schedulers] == [a + b for a, b in zip(first, slots, strict=True)]
    for scheduler in schedulers:
        long_tiles = scheduler[1:]
        assert long_tiles[0] == 0
        assert long_tiles.diff().count_nonzero() == 2
        assert (long_tiles.diff() >= 0).all()
    assert min(slots) > groups


def test_equal_rows_go_in_their_order(schedulers: list[torch.Tensor]) -> None:
    case = Case("jagged_attention", "", **ONE, lengths=(20,) * 12)
    results(case.op, guarded_inputs(case, torch.bfloat16))
    assert [int(scheduler[-1]) for scheduler in schedulers] == [0, 0]
