"""Compiled peers: one `torch.compile(dynamic=True)` per op, and FlexAttention. Compiling is not timed.

The compiled kernels are told to take the threads they find (`cpp.dynamic_threads`), so that one serves 1 and 2 threads.
FlexAttention's must not be: it has memory for the threads that it was compiled with and overruns it on more, and with
that setting PyTorch's cache of compiled code does not tell them apart. Its first call must have the most threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Rows of a mask's blocks; PyTorch's own default.
_BLOCK = 128
# Widths of padded keys for FlexAttention: with 104 and 120, compiled for sizes that vary, torch 2.13 is wrong on CPU.
FLEX_WIDTHS = 16
# FlexAttention's index tables keep this many places, whatever the batch: with sizes that vary, torch 2.13 writes code
# for the CPU that does not compile (a size named ks18 is taken for ks1).
_CAPACITY = 1 << 18


@functools.cache
def compiled(function: Callable[..., Any], any_threads: bool = True) -> Callable[..., Any]:
    """`torch.compile` of it, once; new sizes are not compiled again, and if there are too many after all, it raises.

    With `any_threads` it runs on any number of threads, else on no more than there are at its first call.
    """
    import torch._dynamo.config
    import torch.fx.experimental._config

    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal by chance are not one size
    return torch.compile(function, dynamic=True, options={"cpp.dynamic_threads": any_threads})


def _fixed(values: Tensor) -> Tensor:
    """The values at the front of a table of `_CAPACITY` places."""
    table = values.new_zeros(_CAPACITY)
    table[: len(values)] = values
    torch._dynamo.mark_static(table)
    return table


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    # It refuses tensors that want gradients, also where none are recorded.
    out: Tensor = compiled(flex_attention, any_threads=False)(
        *(x.detach() for x in (q, k, v)), block_mask=mask, scale=scale
    )
    return out


def flex_jagged(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """Packed tokens as one row, with a document mask: no padding.

    The block mask is made for every batch, as a user pays it, from the offsets: block `i` of queries meets the blocks
    of keys from the start of its first token's row to the end of its last token's. (`create_block_mask` would evaluate
    all pairs of tokens.)
    """
    tokens = len(q)
    lengths = offsets.diff()
    row = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths, output_size=tokens)
    blocks = -(-tokens // _BLOCK)
    first = torch.arange(blocks, device=q.device) * _BLOCK
    last = (first + _BLOCK - 1).clamp(max=tokens - 1)
    low = offsets[row[first]] // _BLOCK
    count = (offsets[row[last] + 1] - 1) // _BLOCK - low + 1
    found = (low[:, None] + torch.arange(blocks, device=q.device)).clamp(max=blocks - 1)
    table = _fixed(row)

    def same_row(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return table[i] == table[j]

    mask = BlockMask.from_kv_blocks(
        count.int()[None, None],
        found.int()[None, None],
        BLOCK_SIZE=_BLOCK,
        mask_mod=same_row,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _flex(queries, keys, values, mask, scale)[0].transpose(0, 1)


def flex_padded(q: Tensor, k: Tensor, v: Tensor, held: Tensor, scale: float) -> Tensor:
    """Padded tensors, each row with its own number of key blocks: what is behind them is not computed."""
    lengths = held.sum(-1).flatten()
    rows, width, queries = len(lengths), k.shape[2], q.shape[2]
    blocks = -(-width // _BLOCK), -(-queries // _BLOCK)
    count = (-(-lengths // _BLOCK)).int()[:, None, None].expand(rows, 1, blocks[1])
    found = torch.arange(blocks[0], dtype=torch.int32, device=q.device).expand(rows, 1, blocks[1], blocks[0])
    table = _fixed(lengths)

    def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < table[b]

    mask = BlockMask.from_kv_blocks(
        count.contiguous(),
        found.contiguous(),
        BLOCK_SIZE=_BLOCK,
        mask_mod=inside,
        seq_lengths=(queries, width),
        compute_q_blocks=False,
    )
    return _flex(q, k, v, mask, scale)
