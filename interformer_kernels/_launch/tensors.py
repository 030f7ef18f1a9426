"""Tensors as kernels read them, in raw memory."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Optional, TypeVar

import torch
from torch import Tensor

from interformer_kernels._calls import AttentionCall, Ints, Table, Values, Wide, fields_of

Given = TypeVar("Given", Tensor, Optional[Tensor])

# Floating tensors of a call that kernels read in place; of `q` they take any strides.
_READ_IN_PLACE = tuple(
    place
    for place, field in enumerate(fields_of(AttentionCall))
    if field.name != "q" and isinstance(field.note, (Values, Table))
)
# Tables, times and numbers of targets: small tensors, which kernels read without strides.
_READ_CONTIGUOUS = tuple(
    place for place, field in enumerate(fields_of(AttentionCall)) if isinstance(field.note, (Wide, Ints))
)


def resolved(x: Given) -> Given:
    """`x` with its negation carried out, where it is a lazily negated view: raw memory does not show it."""
    return x.resolve_neg() if x is not None and x.is_neg() else x


def readable(x: Given) -> Given:
    """`x` as kernels read it in place: any strides, but a contiguous last axis; a copy where that does not hold.

    Of offsets and positions, which have one axis, kernels take no strides at all.
    """
    if x is None:
        return x
    if x.is_neg():
        x = x.resolve_neg()
    if x.is_contiguous() or x.shape[-1] <= 1 or x.stride(-1) == 1:
        return x
    return x.contiguous()


Call = TypeVar("Call", bound=NamedTuple)


def readable_call(call: Call) -> Call:
    """A call without optional tensors, its floating ones as kernels read them in place."""
    return call._replace(**{name: readable(getattr(call, name)) for name in _values_of(type(call))})


@functools.cache
def _values_of(call: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields_of(call) if isinstance(field.note, Values))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels add up in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def table_gradients(call: AttentionCall) -> tuple[Tensor, ...]:
    """Memory for the gradients of sinks, position bias and time bias; without numbers for a table that is not given."""
    dtype, tables = accumulation_dtype(call.k.dtype), (call.sinks, call.position_bias, call.time_bias)
    return tuple(call.k.new_empty((0,) if x is None else x.shape, dtype=dtype) for x in tables)


def allows_tf32(dtype: torch.dtype) -> bool:
    """Whether float32 may be multiplied by tensor cores: as PyTorch's own matrix products on a GPU are.

    PyTorch's older switch, `allow_tf32`, raises where it is read after the newer one was set; this one knows of both.
    """
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def expanded(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """`x` broadcast to `shape` by strides of 0."""
    x = resolved(x)
    return x if x is None or x.shape == shape else x.expand(shape)


def fitted(call: AttentionCall, shape: tuple[int, ...]) -> AttentionCall:
    """The call with its tensors as the kernels read them, and the gate of the output's `shape` by strides of 0."""
    q, gate = resolved(call.q), expanded(call.gate, shape)
    changed: dict[str, Any] = {}
    if q is not call.q or gate is not call.gate:
        changed = {"q": q, "gate": gate}
    for place in _READ_IN_PLACE:
        x: Any = call[place]
        if x is not None and (x := readable(x)) is not call[place]:
            changed[call._fields[place]] = x
    for place in _READ_CONTIGUOUS:
        x = call[place]
        if x is not None and not (x.is_contiguous() and not x.is_neg()):
            changed[call._fields[place]] = x.contiguous().resolve_neg()
    return call._replace(**changed) if changed else call


def broadcast_axes_as_ones(x: Tensor, axes: int) -> Tensor:
    """`x` with leading axes of size 1 up to `axes` axes."""
    return x.view((1,) * (axes - x.dim()) + tuple(x.shape))
