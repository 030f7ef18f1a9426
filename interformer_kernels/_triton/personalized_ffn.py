# mypy: allow-untyped-calls, allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs
"""Personalised feed-forward in Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from interformer_kernels._calls import FfnCall
from interformer_kernels._launch.tensors import readable, resolved
from interformer_kernels._triton import _run
from interformer_kernels._triton._arguments import Table
from interformer_kernels._triton._maps import activate, activation_grad, dot, narrow
from interformer_kernels._triton._rows import find, slots, span
from interformer_kernels._triton._tiles import padded, tiles


class Weight(NamedTuple):
    """The rows' matrices `[B, E, F]`, with the strides of rows, inputs and outputs."""

    pointer: Any
    row: Any
    inner: Any
    outer: Any


_STEP = 32  # channels of a step along a sum over channels


@triton.jit(do_not_specialize=["rows", "tokens"])
def row_products(
    x, weight, bias, residual, grad_out, out, offsets, rows, tokens,
    E: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`act(x W + bias) + residual` of a tile of tokens and outputs; with a `grad_out` instead
    `grad_out * act'(x W + bias)`."""
    blocks: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    i_f = tl.program_id(0) % blocks
    row, first, count, tile = find(tl.program_id(0) // blocks, offsets, rows, tokens, 1, BLOCK_T)
    if tile * BLOCK_T >= count:
        return
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    o_e = tl.arange(0, BLOCK_E)
    loaded = tl.where(row < rows, count, 0)
    m_t = t < loaded  # [BLOCK_T]
    m_out = (t < count)[:, None] & (o_f < F)[None, :]  # [BLOCK_T, BLOCK_F]
    m_in = m_t[:, None] & (o_f < F)[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    if row < rows:
        for e in range(0, E, BLOCK_E):
            m_e = e + o_e < E  # [BLOCK_E]
            p_x = (first + t)[:, None] * x.row + (e + o_e)
            b_x = tl.load(x.pointer + p_x, mask=m_t[:, None] & m_e[None, :], other=0.0)
            p_w = (
                row.to(tl.int64) * weight.row
                + (e + o_e).to(tl.int64)[:, None] * weight.inner
                + o_f.to(tl.int64) * weight.outer
            )
            b_w = tl.load(weight.pointer + p_w, mask=m_e[:, None] & (o_f < F)[None, :], other=0.0)
            acc += dot(b_x, b_w, PRECISION)
    if bias is not None:
        p_bias = row.to(tl.int64) * bias.row + o_f
        b_bias = tl.load(bias.pointer + p_bias, mask=o_f < tl.where(row < rows, F, 0), other=0.0)
        acc += b_bias.to(tl.float32)[None, :]
    if grad_out is not None:
        p_grad = (first + t)[:, None] * grad_out.row + o_f
        b_grad = tl.load(grad_out.pointer + p_grad, mask=m_in, other=0.0).to(tl.float32)
        acc = b_grad * activation_grad(acc, ACTIVATION, x.pointer.dtype.element_ty)
    else:
        acc = activate(acc, ACTIVATION, x.pointer.dtype.element_ty)
        if residual is not None:
            p_res = (first + t)[:, None] * residual.row + o_f
            acc += tl.load(residual.pointer + p_res, mask=m_in, other=0.0).to(tl.float32)
    b_out = narrow(tl.where(m_in, acc, 0.0), out.dtype.element_ty)
    tl.store(out + (first + t)[:, None] * F + o_f, b_out, mask=m_out)


@triton.jit(do_not_specialize=["rows", "tokens"])
def row_grad_weight(
    x, grad, grad_weight, grad_bias, offsets, rows, tokens,
    E: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of `x' grad` of one row, summed over its tokens in order, and of `grad`'s sum over tokens."""
    blocks_f: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    blocks_e: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    i_f = tl.program_id(0) % blocks_f
    i_e = tl.program_id(0) // blocks_f % blocks_e
    row = tl.program_id(0) // (blocks_f * blocks_e)
    first, count = span(offsets, row, rows, tokens)
    o_e = i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    acc = tl.zeros([BLOCK_E, BLOCK_F], tl.float32)
    bias_acc = tl.zeros([BLOCK_F], tl.float32)
    for start in range(0, count, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        m_t = (t < count)[:, None]  # [BLOCK_T, 1]
        b_x = tl.load(x.pointer + (first + t)[:, None] * x.row + o_e, mask=m_t & (o_e < E)[None, :], other=0.0)
        p_grad = (first + t)[:, None] * grad.row + o_f
        b_grad = tl.load(grad.pointer + p_grad, mask=m_t & (o_f < F)[None, :], other=0.0)
        acc += dot(tl.trans(b_x), b_grad, PRECISION)
        if grad_bias is not None:
            bias_acc += tl.sum(b_grad.to(tl.float32), 0)
    p_weight = (row.to(tl.int64) * E + o_e)[:, None] * F + o_f
    m_weight = (o_e < E)[:, None] & (o_f < F)[None, :]
    tl.store(grad_weight + p_weight, narrow(acc, grad_weight.dtype.element_ty), mask=m_weight)
    if grad_bias is not None:
        p_bias = row.to(tl.int64) * F + o_f
        tl.store(grad_bias + p_bias, narrow(bias_acc, grad_bias.dtype.element_ty), mask=o_f < tl.where(i_e == 0, F, 0))


def _products(
    x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, residual: Tensor | None, grad_out: Tensor | None,
    activation: str,
) -> Tensor:  # fmt: skip
    tokens, (rows, inner, outer) = x.shape[0], weight.shape
    out = x.new_empty(tokens, outer)
    chosen = tiles("personalized_ffn", max(inner, outer), x.element_size(), _run.target_of(x))
    block = min(chosen.keys, padded(outer))
    if out.numel():
        _run.start(
            row_products, slots(tokens, rows, 1, chosen.queries) * -(-outer // block),
            _table(x), Weight(weight, *weight.stride()), _table(bias), _table(residual), _table(grad_out),
            out, offsets, rows, tokens,
            E=inner, F=outer, ACTIVATION=activation, BLOCK_T=chosen.queries, BLOCK_F=block,
            BLOCK_E=min(_STEP, padded(inner)), PRECISION=_run.precision(x.dtype), lead=x, tiles=chosen,
        )  # fmt: skip
    return out


def _table(x: Tensor | None) -> Table | None:
    return None if x is None else Table(x, x.stride(0))


def forward(call: FfnCall, residual: Tensor | None) -> Tensor:
    """The output `[T, F]`."""
    x, weight, offsets = readable(call.x), resolved(call.weight), readable(call.offsets)
    return _products(x, weight, offsets, readable(call.bias), readable(residual), None, call.activation)


def backward(call: FfnCall, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x, weight, bias`; an empty one for a bias that was not given."""
    x, weight, offsets = readable(call.x), resolved(call.weight), readable(call.offsets)
    grad, bias, activation = readable(grad_out), readable(call.bias), call.activation
    if activation != "identity":
        grad = _products(x, weight, offsets, bias, None, grad, activation)
    grad_x = _products(grad, weight.transpose(1, 2), offsets, None, None, None, "identity")
    grad_weight = x.new_empty(weight.shape)
    grad_bias = x.new_empty((0,) if bias is None else bias.shape)
    rows, inner, outer = weight.shape
    chosen = tiles("grad_weight", max(inner, outer), x.element_size(), _run.target_of(x))
    block_e, block_f = min(chosen.queries, padded(inner)), min(chosen.keys, padded(outer))
    if weight.numel() or grad_bias.numel():
        _run.start(
            row_grad_weight, rows * max(1, -(-inner // block_e)) * -(-outer // block_f),
            _table(x), _table(grad), grad_weight, None if bias is None else grad_bias, offsets, rows, x.shape[0],
            E=inner, F=outer, BLOCK_E=block_e, BLOCK_F=block_f, BLOCK_T=_STEP,
            PRECISION=_run.precision(x.dtype), lead=x, tiles=chosen,
        )  # fmt: skip
    return grad_x, grad_weight, grad_bias
