"""The ops of the attention family in Triton: one set of kernels for all layouts, started from here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interformer_kernels._calls import AttentionCall
from interformer_kernels._launch import long_rows
from interformer_kernels._launch.gate_gradient import gate_gradient, gate_sums
from interformer_kernels._launch.tensors import expanded, readable
from interformer_kernels._triton import _run
from interformer_kernels._triton._attention_backward import (
    attention_grad_keys,
    attention_grad_queries,
    epilogue_backward,
)
from interformer_kernels._triton._attention_forward import attention_forward
from interformer_kernels._triton._attention_output import add_pieces, attention_merge
from interformer_kernels._triton._attention_short import attention_backward_short, attention_forward_short
from interformer_kernels._triton._rows import slots
from interformer_kernels._triton._tiles import Tiles, entries, padded, tiles, variant
from interformer_kernels._triton.apply_rotary import rotated

_FEWEST = 16  # rows of a tile that tensor cores take
_NUMBERS = 4096  # of a tile of the epilogue's backward
_WIDE = 128  # channels of a head, padded, from which on heads are not packed
# A query's numbers in the backward: gradient of A, log-sum-exp, and the sums that `_attention_backward._softmax_of`
# makes delta of.
_Sides = tuple[Tensor, Tensor, Tensor]


class _Problem:
    """A call made ready for the kernels: tensors to be read in place, and what kernels take in common."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call
        self.out_shape = call.out_shape()
        self.kv_offsets = readable(call.kv_offsets)
        self.q_offsets = self.kv_offsets if call.q_offsets is None else readable(call.q_offsets)
        q, k, v = call.q, call.k, call.k if call.v is None else call.v
        if call.cos is not None and call.sin is not None:
            tables = call.cos, call.sin
            q = rotated(q, self.q_offsets, *tables, call.positions_q, call.rope_interleaved, backwards=False)
            k = rotated(k, self.kv_offsets, *tables, call.positions_k, call.rope_interleaved, backwards=False)
        self.q, self.k, self.v = readable(q), readable(k), readable(v)
        self.rows = call.kv_offsets.shape[0] - 1
        self.heads, self.kv_heads = q.shape[-2], k.shape[1]
        # Query tokens of all rows as outputs are numbered, and of one row where all have the same.
        self.tokens = self.out_shape[0] if call.layout == "packed" else self.out_shape[0] * self.out_shape[1]
        self.queries = 0 if call.layout == "packed" else self.out_shape[1]
        self.group = self.heads // self.kv_heads
        self.width = max(padded(self.k.shape[2]), padded(self.v.shape[2]))
        self.pack = self._pack()
        self.softmax = call.score == "softmax"
        self.exact = self.softmax and k.dtype == torch.float32
        self.anew = self.exact  # Sums of all queries' weights, and delta, are made anew in the backward.

    def _pack(self) -> int:
        """Key/value heads that a program takes at once, so that few queries fill a tile.

        Of wide heads one: to repeat each head alone (`_attention_tiles.of_attempt`) takes registers that they lack.
        """
        pack = 1
        if self.call.layout != "packed" and self.queries and self.width < _WIDE:
            while self.kv_heads % (2 * pack) == 0 and 2 * pack * self.group * self.queries <= _FEWEST:
                pack *= 2
        return pack

    @property
    def units(self) -> int:
        """Query heads of a program."""
        return self.pack * self.group

    def tiles(self, kernel: str) -> Tiles:
        """Tiles of a kernel; no more queries than rows have, where that is known."""
        on = self.width, self.k.element_size(), _run.target_of(self.k)
        found = tiles(kernel, *on)
        if self.call.layout == "packed":
            return (variant("grad_queries_packed", *on) if kernel == "grad_queries" else None) or found
        return found._replace(queries=min(found.queries, padded(max(1, self.queries * self.units))))

    def short(self, backward: bool = False) -> Tiles | None:
        """Tiles of short rows, of `keys` tokens at most; None where there are none."""
        on = self.k.element_size(), _run.target_of(self.k)
        if self.call.layout != "packed" or self.width > max(entries("short", *on)):
            return None
        found = tiles("short", self.width, *on)
        own = variant("short_backward", self.width, *on) if backward else None
        # Both passes leave the same rows to these kernels, also where a tuned tile has other rows.
        return own if own is not None and own.keys == found.keys else found

    @property
    def cell(self) -> int:
        """Tokens of a row that is left to the kernels of short rows."""
        short = self.short()
        return 0 if short is None else short.keys

    def pieces(self, split: int) -> int:
        """Room for the chunks of all rows of more than `split` keys (`_attention_output.piece`)."""
        return long_rows.pieces(self.k.shape[0], split)

    @property
    def epilogue_tokens(self) -> int:
        """Tokens of a tile of the epilogue's backward."""
        return max(1, _NUMBERS // padded(self.out_shape[-1]))

    def query_slots(self, block: int, rows: int) -> int:
        """Slots of tiles of queries, over all rows of the batch or runs of them."""
        if self.call.layout == "packed":
            return slots(self.tokens, rows, self.units, block)
        return rows * -(-self.queries * self.units // block)

    def sizes(self) -> tuple[int, ...]:
        """Rows, tokens and masks, as the kernels take them; no larger than tokens are many."""
        call, most = self.call, max(self.tokens, self.k.shape[0])
        limits = call.skip_prefix, call.window_left, call.window_right, call.num_prefix
        skip, left, right, prefix = (min(limit, most) for limit in limits)
        return self.rows, self.tokens, self.k.shape[0], self.queries, min(skip, self.k.shape[0]), left, right, prefix

    def strides(self, x: Tensor | None) -> tuple[int, int, int]:
        """Strides of rows, tokens and heads of a tensor of the queries' or the output's layout."""
        if x is None:
            return 0, 0, 0
        return (0, x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0), x.stride(1), x.stride(2))

    def common(self) -> dict[str, Any]:
        """What all kernels of keys are compiled for."""
        call = self.call
        return {
            "D": self.k.shape[2],
            "DV": self.v.shape[2],
            "GROUP": self.group,
            "SCORE": call.score,
            "CAUSAL": call.causal,
            "LEFT": call.window_left >= 0,
            "RIGHT": call.window_right >= 0,
            "PREFIX": call.num_prefix > 0,
            "CELL": self.cell,
            "BLOCK_D": padded(self.k.shape[2]),
            "BLOCK_DV": padded(self.v.shape[2]),
            "PRECISION": _run.precision(self.k.dtype),
        }

    def constants(self, found: Tiles) -> dict[str, Any]:
        """What the kernels of tiles of one row are compiled for."""
        return {
            **self.common(),
            "PACK": self.pack,
            "PACKS": self.kv_heads // self.pack,
            "LAYOUT": self.call.layout,
            "V_IS_K": self.call.v is None,
            "BLOCK_Q": found.queries,
            "BLOCK_K": found.keys,
        }


def forward(call: AttentionCall, residual: Tensor | None, keep_attn_out: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(out, lse, attn_out)`; `lse` is empty without softmax, `attn_out` unless it is to be kept."""
    problem, k, softmax = _Problem(call), call.k, call.score == "softmax"
    shape = problem.out_shape
    out = k.new_empty(shape)
    lse = k.new_empty(shape[:-1] if softmax else (0,), dtype=torch.float32)
    attn_out = k.new_empty(shape if keep_attn_out else (0,), dtype=torch.float32)
    if not out.numel():
        return out, lse, attn_out
    gate = expanded(call.gate, shape)
    residual = readable(residual)
    found, split = problem.tiles("forward"), long_rows.split(call)
    pieces = k.new_empty((problem.pieces(split), *shape[1:]) if split else 0, dtype=torch.float32)
    weights = k.new_empty((problem.pieces(split), *shape[1:-1], 2) if split else 0, dtype=torch.float32)
    packs = problem.kv_heads // problem.pack
    tiles_of_queries = problem.query_slots(found.queries, 1)
    chunks = slots(k.shape[0], problem.rows, 1, split) * tiles_of_queries if split else 0
    epilogue = {
        "GATE": gate is not None,
        "FORM": call.gate_form,
        "ACTIVATION": call.gate_activation,
        "RESIDUAL": residual is not None,
        "KEEP": keep_attn_out,
    }
    of_epilogue = *problem.strides(gate), 0 if gate is None else gate.stride(-1), *problem.strides(residual)
    _run.start(
        attention_forward, (chunks or problem.query_slots(found.queries, problem.rows)) * packs,
        problem.q, problem.k, problem.v, gate, residual, out, lse, attn_out, pieces, weights,
        problem.q_offsets, problem.kv_offsets, *problem.sizes(), call.scale, call.post_scale,
        *problem.strides(problem.q), *problem.k.stride()[:2], *problem.v.stride()[:2], *of_epilogue,
        **problem.constants(found), **epilogue, SPLIT=split, tiles=found,
    )  # fmt: skip
    _start_short(problem, attention_forward_short, (gate, residual, out, lse, attn_out), of_epilogue, **epilogue)
    if split:
        block = max(1, min(_NUMBERS // padded(shape[-1]), padded(problem.queries * problem.heads)))
        _run.start(
            attention_merge, (k.shape[0] // split + 1) * -(-problem.queries * problem.heads // block),
            pieces, weights, gate, residual, out, lse, attn_out, problem.kv_offsets,
            problem.rows, k.shape[0], problem.queries, min(call.skip_prefix, k.shape[0]), *of_epilogue,
            HEADS=problem.heads, DV=shape[-1], LAYOUT=call.layout, SCORE=call.score, **epilogue, SPLIT=split,
            BLOCK_Q=block, BLOCK_DV=padded(shape[-1]), tiles=Tiles(block, padded(shape[-1]), 4, 1),
        )  # fmt: skip
    return out, lse, attn_out


def _start_short(
    problem: _Problem, kernel: Any, tensors: tuple[Tensor | None, ...], strides: tuple[int, ...], **constants: Any
) -> None:
    """Start a kernel of short rows, several to a program, where the layout has them."""
    found = problem.short(backward=kernel is attention_backward_short)
    if found is None:
        return
    q, k, v = problem.q, problem.k, problem.v
    rows, q_tokens, k_tokens, _, _, left, right, prefix = problem.sizes()
    _run.start(
        kernel, -(-rows // (found.queries // found.keys)) * problem.kv_heads,
        q, k, v, *tensors, problem.q_offsets, problem.kv_offsets,
        rows, q_tokens, k_tokens, left, right, prefix, problem.call.scale, problem.call.post_scale,
        *problem.strides(q)[1:], *k.stride()[:2], *v.stride()[:2], *strides,
        **problem.common(), **constants, KV_HEADS=problem.kv_heads, BLOCK=found.queries, tiles=found,
    )  # fmt: skip


def backward(
    call: AttentionCall, grad_out: Tensor, attn_out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `q, k, v, gate`; an input that was not given has an empty one."""
    problem = _Problem(call)
    # Where A is missing, delta comes from the weights: never from an output, whose rounding a confident softmax shows.
    problem.anew |= problem.softmax and not attn_out.numel()
    grad_attn_out, delta, grad_gate = _through_epilogue(problem, readable(grad_out), attn_out)
    if call.post_scale != 1:
        # Before the products with values, which then overflow less; inside the kernels it would cost registers.
        grad_attn_out = grad_attn_out * call.post_scale
    sides = grad_attn_out, lse, delta
    grad_q = _grad_queries(problem, sides)
    grad_k, grad_v = _grad_keys(problem, sides)
    of_grad = problem.strides(grad_attn_out)[1:]
    _start_short(problem, attention_backward_short, (grad_attn_out, grad_q, grad_k, grad_v), of_grad)
    if call.cos is not None and call.sin is not None:
        tables = call.cos, call.sin
        grad_q = rotated(grad_q, problem.q_offsets, *tables, call.positions_q, call.rope_interleaved, backwards=True)
        grad_k = rotated(grad_k, problem.kv_offsets, *tables, call.positions_k, call.rope_interleaved, backwards=True)
    return grad_q, grad_k, grad_v, grad_gate


def _through_epilogue(problem: _Problem, grad_out: Tensor, attn_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of A, delta, and gradient of the gate."""
    call, shape, softmax = problem.call, problem.out_shape, problem.softmax
    delta = grad_out.new_empty((*shape[:-1], 2) if softmax else (0,), dtype=torch.float32)
    if call.gate is None and (problem.anew or not softmax):
        return grad_out, delta, grad_out.new_empty(0)
    gate = expanded(call.gate, shape)
    grad_attn_out = grad_out if gate is None else torch.empty_like(grad_out, memory_format=torch.contiguous_format)
    block, wide = problem.epilogue_tokens, padded(shape[-1])
    sums, over_tokens, over_channels = grad_out.new_empty(0), False, False
    if call.gate is not None:
        sums, over_tokens, over_channels = gate_sums(call.gate, shape, block)
    if grad_out.numel():
        _run.start(
            epilogue_backward, -(-problem.tokens // block) * problem.heads,
            grad_out, attn_out, gate, grad_attn_out, delta, sums, problem.q_offsets,
            problem.rows, problem.tokens, problem.queries, *problem.strides(grad_out), *problem.strides(gate),
            0 if gate is None else gate.stride(-1),
            HEADS=problem.heads, DV=shape[-1], LAYOUT=call.layout, SOFTMAX=softmax and not problem.anew,
            GATE=gate is not None, FORM=call.gate_form, ACTIVATION=call.gate_activation,
            SUM_TOKENS=over_tokens, SUM_CHANNELS=over_channels, BLOCK_T=block, BLOCK_DV=wide,
            tiles=Tiles(block, wide, 8, 1),
        )  # fmt: skip
    grad_gate = sums if call.gate is None else gate_gradient(call.gate, sums, shape)
    return grad_attn_out, delta, grad_gate


def _over_queries(problem: _Problem, sides: _Sides, out: Tensor, runs: tuple[int, int, int] | None) -> None:
    """Start the pass for dQ: into `out`, or sums of P and P * dP where `out` is delta itself.

    `runs`: of shared queries, whose gradient is a sum over rows: number of runs, rows of a run, parts of a row's keys.
    """
    gradient, found = out is not sides[2], problem.tiles("grad_queries")
    rough = not gradient and not problem.anew
    split = long_rows.split(problem.call) if runs is None and (gradient or problem.exact) else 0
    pieces = out.new_empty((problem.pieces(split), *out.shape[1:]) if split else 0, dtype=torch.float32)
    count, rows_of_run, parts = runs or (problem.rows, 1, 1)
    tiles_of_queries = problem.query_slots(found.queries, 1)
    chunks = slots(problem.k.shape[0], problem.rows, 1, split) * tiles_of_queries if split else 0
    grid = chunks or problem.query_slots(found.queries, count * parts)
    q, k, v = problem.q, problem.k, problem.v
    _run.start(
        attention_grad_queries, grid * (problem.kv_heads // problem.pack),
        q, k, v, *sides, out, pieces, problem.q_offsets, problem.kv_offsets,
        *problem.sizes(), rows_of_run, parts, problem.call.scale,
        *problem.strides(q), *k.stride()[:2], *v.stride()[:2], *problem.strides(sides[0]),
        **problem.constants(found), EXACT=problem.exact, GRADIENT=gradient, ROUGH=rough, SPLIT=split,
        tiles=found,
    )  # fmt: skip
    if split:
        wide = padded(out.shape[-1])
        block = max(1, min(_NUMBERS // wide, padded(problem.queries * problem.heads)))
        _run.start(
            add_pieces, (k.shape[0] // split + 1) * -(-problem.queries * problem.heads // block),
            pieces, out, problem.kv_offsets,
            problem.rows, k.shape[0], problem.queries, min(problem.call.skip_prefix, k.shape[0]),
            HEADS=problem.heads, C=out.shape[-1], SPLIT=split, BLOCK_Q=block, BLOCK_C=wide,
            tiles=Tiles(block, wide, 8, 1),
        )  # fmt: skip


def _grad_queries(problem: _Problem, sides: _Sides) -> Tensor:
    """dQ; of shared queries summed over runs of rows and parts of their keys, and then over all of them."""
    q, grad_q = problem.q, problem.q.new_empty(problem.call.q.shape)
    if sides[2].numel():
        _over_queries(problem, sides, sides[2], None)
    if problem.call.layout != "shared":
        if grad_q.numel():
            _over_queries(problem, sides, grad_q, None)
        return grad_q
    runs, parts = long_rows.runs(problem.call)
    sums = q.new_empty((runs * parts, *q.shape), dtype=torch.float32)
    if sums.numel():
        _over_queries(problem, sides, sums, (runs, -(-problem.rows // runs), parts))
    return sums.sum(0).to(q.dtype)


def _grad_keys(problem: _Problem, sides: _Sides) -> tuple[Tensor, Tensor]:
    """dK and dV; an empty dV where values are keys."""
    call, k, v = problem.call, problem.k, problem.v
    grad_k = k.new_empty(k.shape)
    grad_v = v.new_empty(v.shape if call.v is not None else (0,))
    found = problem.tiles("grad_keys")
    grid = slots(k.shape[0], problem.rows, problem.pack, found.keys) * (problem.kv_heads // problem.pack)
    if k.shape[0]:
        _run.start(
            attention_grad_keys, grid,
            problem.q, k, v, *sides, grad_k, grad_v, problem.q_offsets, problem.kv_offsets,
            *problem.sizes(), call.scale,
            *problem.strides(problem.q), *k.stride()[:2], *v.stride()[:2], *problem.strides(sides[0]),
            **problem.constants(found), EXACT=problem.exact, tiles=found,
        )  # fmt: skip
    return grad_k, grad_v
