"""The other ways to compute an op, as users write them today: padded SDPA (padding included), and SDPA row by row.

A peer takes the keyword arguments of the public function and returns its output. None is timed before `check` has
found its answers right, gradients included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import interformer_kernels
from interformer_kernels import jagged, testing

Inputs = Mapping[str, Any]
Peer = Callable[..., Tensor]
OPS = ("pma_pooling", "jagged_attention", "gated_cross_attention")
# The name this package's own op goes by among its peers.
OURS = "interformer"
# A peer is left out for wrong answers, not for roundings: it may miss our own budget this many times over.
_ALLOWANCE = 10.0


# ---------------------------------------------------------------- padded


def _padded(x: Tensor, offsets: Tensor, width: int) -> Tensor:
    """`[T, H, D]` to `[B, H, L, D]`, as SDPA reads it."""
    return jagged.to_padded(x, offsets, max_length=width).transpose(1, 2)


def _padded_keys(k: Tensor, v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Padded keys and values, and which places hold a token, `[B, 1, 1, L]`."""
    lengths = offsets.diff()
    width = int(lengths.max())
    held = torch.arange(width, device=k.device) < lengths[:, None]
    return _padded(k, offsets, width), _padded(v, offsets, width), held[:, None, None]


def _padded_dense_queries(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Queries `[B, N, H, D]` over padded keys."""
    keys, values, held = _padded_keys(k, v, offsets)
    out = sdpa(q.transpose(1, 2), keys, values, attn_mask=held)
    return out.where(held.any(-1, keepdim=True), 0).transpose(1, 2)  # rows without keys


def padded_pma_pooling(seeds: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Pad keys and values, expand the seeds."""
    return _padded_dense_queries(seeds.expand(len(offsets) - 1, *seeds.shape), k, v, offsets)


def padded_gated_cross_attention(q: Tensor, k: Tensor, v: Tensor, kv_offsets: Tensor) -> Tensor:
    """Pad keys and values."""
    return _padded_dense_queries(q, k, v, kv_offsets)


def padded_jagged_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """Pad all three, attend, unpad."""
    keys, values, held = _padded_keys(k, v, offsets)
    out = sdpa(_padded(q, offsets, keys.shape[2]), keys, values, attn_mask=held)
    return jagged.from_padded(out.transpose(1, 2), mask=held.flatten(1)).values


# ---------------------------------------------------------------- row by row


def _rows(x: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """`[T, H, D]` to each row's `[H, L, D]`."""
    return x.transpose(0, 1).split(offsets.diff().tolist(), dim=1)


def row_wise_pma_pooling(seeds: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """One SDPA per row, stacked."""
    return row_wise_gated_cross_attention(seeds.expand(len(offsets) - 1, *seeds.shape), k, v, offsets)


def row_wise_gated_cross_attention(q: Tensor, k: Tensor, v: Tensor, kv_offsets: Tensor) -> Tensor:
    """One SDPA per row, stacked."""
    rows = zip(q.transpose(1, 2), _rows(k, kv_offsets), _rows(v, kv_offsets), strict=True)
    return torch.stack([sdpa(*row) if row[1].shape[1] else _nothing(*row) for row in rows]).transpose(1, 2)


def row_wise_jagged_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    """One SDPA per row, joined."""
    rows = zip(*(_rows(x, offsets) for x in (q, k, v)), strict=True)
    return torch.cat([sdpa(*row) for row in rows if row[0].shape[1]], dim=1).transpose(0, 1)


def _nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What a row without keys yields."""
    return query.new_zeros(*query.shape[:2], value.shape[2])


# ---------------------------------------------------------------- who runs, and is it right


PEERS: dict[str, dict[str, Peer]] = {
    "pma_pooling": {"padded SDPA": padded_pma_pooling, "per-row SDPA": row_wise_pma_pooling},
    "jagged_attention": {"padded SDPA": padded_jagged_attention, "per-row SDPA": row_wise_jagged_attention},
    "gated_cross_attention": {
        "padded SDPA": padded_gated_cross_attention,
        "per-row SDPA": row_wise_gated_cross_attention,
    },
}


def candidates(op: str, backend: str | None = None) -> dict[str, Peer]:
    """This package's op, first, and its peers."""

    def ours(**arguments: Any) -> Tensor:
        return getattr(interformer_kernels, op)(**arguments, backend=backend)

    return {OURS: ours, **PEERS[op]}


def inputs(op: str, lengths: tuple[int, ...], dtype: torch.dtype, device: str, **sizes: int) -> dict[str, Any]:
    """The arguments of one call on rows of these lengths, and its `grad_out`; sizes are those of `testing.Case`."""
    return testing.make_inputs(testing.Case(op, "bench", lengths=lengths, tail=0, **sizes), dtype, device)


def forward(peer: Peer, arguments: Inputs) -> Tensor:
    """The output, as inference asks for it."""
    with torch.no_grad():
        return peer(**{name: x for name, x in arguments.items() if name != "grad_out"})


def forward_backward(op: str, peer: Peer, arguments: Inputs) -> dict[str, Tensor]:
    """The output and every gradient, as training asks for them."""
    call = {name: x for name, x in arguments.items() if name != "grad_out"}
    return testing.evaluate(lambda: (peer(**call), None), op, arguments)


def check(op: str, name: str, arguments: Inputs) -> str | None:
    """What is wrong with the output or gradients of the candidate `name` on these inputs; None where all is right.

    Right is the budget of `testing` for this package's op, and ten times as much for its peers.
    """
    allowance = 1.0 if name == OURS else _ALLOWANCE
    peer = candidates(op)[name]

    def run(made: Inputs) -> tuple[Tensor, None]:
        return peer(**{argument: x for argument, x in made.items() if argument != "grad_out"}), None

    try:
        rows = testing.judge([testing.measure(run, op, arguments)])
    except RuntimeError as error:
        return f"failed: {error}"
    for row in rows:
        if not row.error <= allowance * row.budget:
            return f"wrong {row.quantity}: error {row.error:.2e}, budget {allowance * row.budget:.2e}"
    return None
