"""Compiled peers: one `torch.compile(dynamic=True)` per op, and FlexAttention. Compiling is not timed.

Kernels are compiled to use the threads they find at run time (`cpp.dynamic_threads`), so that one compilation serves 1
and 2 threads. FlexAttention must not be: it allocates for the threads that it was compiled with and overruns that
memory on more, and with that setting PyTorch's cache of compiled code does not distinguish the two. Its first call must
have the most threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Rows of a mask's blocks; PyTorch's own default.
_BLOCK = 128
# Padded keys for FlexAttention get a multiple of this width: torch 2.13 is wrong on CPU at 104 and 120 with dynamic
# sizes.
FLEX_WIDTHS = 16
# Size of FlexAttention's index tables, whatever the batch: with dynamic sizes, torch 2.13 generates CPU code that does
# not compile (it confuses the size ks18 with ks1).
_CAPACITY = 1 << 18


@functools.cache
def compiled(function: Callable[..., Any], any_threads: bool = True) -> Callable[..., Any]:
    """`torch.compile` of a function, once; new sizes do not recompile, and too many recompilations raise.

    With `any_threads` the result runs on any number of threads, otherwise on at most those of its first call.
    """
    import torch._dynamo.config
    import torch.fx.experimental._config

    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal by chance may differ later
    return torch.compile(function, dynamic=True, options={"cpp.dynamic_threads": any_threads})


# FlexAttention's `score_mod`: of a score, its batch, head, query and key.
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Within(NamedTuple):
    """A mask inside rows of packed tokens.

    Attributes:
        seen: whether query `i` sees key `j`.
        first_key: for each query, a lower bound of the keys that it sees.
        causal: whether no query sees a later key.
    """

    seen: Callable[[Tensor, Tensor], Tensor]
    first_key: Tensor
    causal: bool


def fixed(values: Tensor, capacity: int = _CAPACITY) -> Tensor:
    """The values at the front of a table of `capacity` entries; its size is compiled in."""
    table = values.new_zeros(capacity, *values.shape[1:])
    table[: len(values)] = values
    torch._dynamo.mark_static(table)
    return table


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, score_mod: ScoreMod | None = None) -> Tensor:
    # FlexAttention refuses tensors that require gradients, even under `no_grad`.
    out: Tensor = compiled(flex_attention, any_threads=False)(
        *(x.detach() for x in (q, k, v)), score_mod, block_mask=mask, scale=scale
    )
    return out


def flex_jagged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    scale: float,
    score_mod: ScoreMod | None = None,
    within: Within | None = None,
) -> Tensor:
    """Packed tokens as one row, with a document mask: no padding.

    The block mask is made from the offsets for every batch, as a user would have to: block `i` of queries meets the
    blocks of keys from the start of its first token's row to the end of its last token's row. (`create_block_mask`
    would evaluate all pairs of tokens.) `score_mod` and `within` get places among the packed tokens.
    """
    tokens = len(q)
    lengths = offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths, output_size=tokens)
    blocks = -(-tokens // _BLOCK)
    first = torch.arange(blocks, device=q.device) * _BLOCK
    last = (first + _BLOCK - 1).clamp(max=tokens - 1)
    low = offsets[row[first]]
    if within is not None:
        low = torch.maximum(low, within.first_key[first])
    low = low // _BLOCK
    high = last if within is not None and within.causal else offsets[row[last] + 1] - 1
    count = high // _BLOCK - low + 1
    kv_blocks = (low[:, None] + torch.arange(blocks, device=q.device)).clamp(max=blocks - 1)
    table = fixed(row)

    def same_row(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = table[i] == table[j]
        return inside if within is None else inside & within.seen(i, j)

    mask = BlockMask.from_kv_blocks(
        count.int()[None, None],
        kv_blocks.int()[None, None],
        BLOCK_SIZE=_BLOCK,
        mask_mod=same_row,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _flex(queries, keys, values, mask, scale, score_mod)[0].transpose(0, 1)


def flex_padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Padded tensors, each row with its own number of key blocks: blocks of padding are not computed."""
    lengths = mask.sum(-1).flatten()
    rows, width, queries = len(lengths), k.shape[2], q.shape[2]
    blocks = -(-width // _BLOCK), -(-queries // _BLOCK)
    count = (-(-lengths // _BLOCK)).int()[:, None, None].expand(rows, 1, blocks[1])
    kv_blocks = torch.arange(blocks[0], dtype=torch.int32, device=q.device).expand(rows, 1, blocks[1], blocks[0])
    table = fixed(lengths)

    def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < table[b]

    block_mask = BlockMask.from_kv_blocks(
        count.contiguous(),
        kv_blocks.contiguous(),
        BLOCK_SIZE=_BLOCK,
        mask_mod=inside,
        seq_lengths=(queries, width),
        compute_q_blocks=False,
    )
    return _flex(q, k, v, block_mask, scale)
