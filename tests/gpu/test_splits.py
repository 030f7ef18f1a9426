"""How the GPU backends cut long rows: from the shapes of a row alone, and into enough programs for a large device."""

import pytest
import torch

import interformer_kernels as ik
from interformer_kernels._calls import AttentionCall
from interformer_kernels._launch import splits

pytest.importorskip("triton")
from interformer_kernels._triton import _run, attention
from interformer_kernels._triton._tiles import Target

PROCESSORS = 132  # of an H200


def _pooling(rows: int, length: int, queries: int, heads: int, channels: int) -> AttentionCall:
    keys = torch.zeros(1, 1, 1).expand(rows * length, heads, channels)
    seeds = torch.zeros(1, 1, 1).expand(queries, heads, channels)
    offsets = torch.arange(rows + 1) * length
    return AttentionCall("shared", seeds, keys, keys, None, offsets, None, "multiply", "sigmoid", 1.0, "softmax", 1.0)


@pytest.mark.parametrize("queries", [0, 1, 2, 4, 5, 8, 16, 31, 32, 33])
def test_splits_follow_from_a_row_alone(queries: int) -> None:
    """The same split for every batch that is longer, a power of two, of few bytes of partials beside its keys."""
    split = splits.split_kv(_pooling(1, 100_000, queries, 4, 16))
    for rows, length in ((1, 2000), (64, 100), (3, 5000)):
        assert splits.split_kv(_pooling(rows, length, queries, 4, 16)) == split
    assert splits.split_kv(_pooling(1, max(split, 1), queries, 4, 16)) == 0
    if queries > 32:
        assert split == 0
    else:
        assert split & (split - 1) == 0
        assert max(128, 32 * queries) <= split <= 1024


def test_few_queries_of_few_long_rows_fill_a_device() -> None:
    """Two queries of 16 rows of 4096 keys: two waves of programs and more, forward and backward."""
    seeds = torch.zeros(2, 8, 64, dtype=torch.bfloat16)
    keys = torch.zeros(16 * 4096, 8, 64, dtype=torch.bfloat16)
    call = _pooling(16, 4096, 2, 8, 64)._replace(q=seeds, k=keys, v=None)
    with _run.recording(Target("cuda", 90)) as launches:
        out, lse, attn_out = attention.forward(call, None, keep_attn_out=True)
        attention.backward(call, out, attn_out, lse)
    grids = {launch.kernel.fn.__name__: launch.grid for launch in launches}
    for kernel in ("attention_forward", "attention_grad_queries", "attention_grad_keys"):
        assert grids[kernel] >= 2 * PROCESSORS, grids


@pytest.mark.parametrize(("rows", "length"), [(1, 3), (16, 4096), (700, 50), (5000, 10), (0, 0)])
@pytest.mark.parametrize("queries", [1, 2, 192])
def test_sums_over_rows_are_bounded(rows: int, length: int, queries: int) -> None:
    """Groups cover all rows; groups and shards together are no more programs than a device needs."""
    call = _pooling(rows, length, queries, 4, 16)
    groups, shards = splits.row_groups(call)
    blocks = -(-queries * 4 // 64)
    assert groups * -(-rows // max(1, groups)) >= rows
    assert groups * shards * blocks <= 2048
    assert 1 <= shards <= max(1, rows * length // 1024)


def _grids(call: AttentionCall) -> dict[str, int]:
    """Programs of the kernels of a forward; none is launched."""
    with _run.recording(Target("cuda", 90)) as launches:
        attention.forward(call, None, keep_attn_out=False)
    return {launch.kernel.fn.__name__: launch.grid for launch in launches}


def test_programs_of_few_queries_are_bounded() -> None:
    """One for each row and each 128 tokens, wherever rows begin; with a plan, for each split, and none is idle."""
    tiny, giant = [7] * 5000, [1] * 500 + [100_000] + [0] * 500
    for lengths, later in ((tiny, 0), (giant, 781), ([128] * 9, 0), ([0] * 9, 0), ([129, 0, 300], 1 + 2)):
        tokens, rows = sum(lengths), len(lengths)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        call = _pooling(1, tokens, 2, 4, 16)._replace(kv_offsets=offsets)
        marks = -(-tokens // 128) if tokens > 128 else 0
        assert _grids(call)["attention_forward"] == rows + marks
        with ik.plan(offsets):
            planned = _grids(call)
        assert planned["attention_forward"] == rows + later
        assert planned.get("combine_partials", 0) == sum(length > 128 for length in lengths)
