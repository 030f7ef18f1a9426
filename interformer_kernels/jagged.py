"""Conversion of padded batches, nested and TorchRec tensors to packed values with offsets, and back.

Inside the library a batch of sequences is ``values [T, ...]`` with ``offsets [B+1]``: row ``b`` is
``values[offsets[b]:offsets[b+1]]``, and tokens from ``offsets[B]`` on (the tail) belong to no row. Everything here is
differentiable in the values, keeps their dtype and device, and takes any dtype, integer ids included.

The number of tokens depends on data: on a GPU, these functions synchronise to read it; on ``meta``, which has no data,
they assume the largest possible number. ``set_validation`` decides whether contents are checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from interformer_kernels import _checks as checks

SIDES = ("right", "left")

_Other = TypeVar("_Other")


class Jagged(NamedTuple):
    """Packed tokens and where each row begins: ``values [T, ...]`` and ``offsets [B+1]``."""

    values: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class PaddedLayout:
    """Positions of the tokens in a padded batch ``[B, L, ...]``: packs and pads tensors of that layout.

    Attributes:
        offsets: ``[B+1]`` int64, of the packed rows.
        index: ``[T]`` int64: token ``t`` is ``x.flatten(0, 1)[index[t]]`` in the padded batch ``x``.
        width: ``L``, the padded length.
    """

    offsets: Tensor
    index: Tensor
    width: int

    @property
    def rows(self) -> int:
        """``B``."""
        return self.offsets.shape[0] - 1

    def pack(self, x: Tensor) -> Tensor:
        """The tokens of a padded ``x [B, L, ...]``, row after row: ``[T, ...]``. Padding gets zero gradients."""
        _check_tensor("pack", "x", x, min_axes=2)
        if x.shape[:2] != (self.rows, self.width):
            raise ValueError(f"pack: x must be [B = {self.rows}, L = {self.width}, ...], found shape {list(x.shape)}")
        _check_device("pack", "x", x, self.index.device)
        return x.flatten(0, 1).index_select(0, self.index)

    def pad(self, values: Tensor, padding_value: float = 0.0) -> Tensor:
        """The inverse of :meth:`pack`: ``values [T, ...]`` as ``[B, L, ...]``, with ``padding_value`` elsewhere."""
        _check_tensor("pad", "values", values)
        _check_device("pad", "values", values, self.index.device)
        tokens = self.index.shape[0]
        if values.shape[0] < tokens:
            raise ValueError(f"pad: values must be [T >= {tokens}, ...], found shape {list(values.shape)}")
        return _scatter(values[:tokens], self.index, self.rows, self.width, padding_value)


class Packed(NamedTuple):
    """The result of :func:`from_padded`: ``values [T, ...]``, ``offsets [B+1]`` int64, and the padded layout."""

    values: Tensor
    offsets: Tensor
    layout: PaddedLayout


def padded_layout(
    rows: int,
    width: int,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    side: str = "right",
) -> PaddedLayout:
    """The layout of padded batches ``[B = rows, L = width, ...]``: arguments and errors of :func:`from_padded`."""
    arguments = {"lengths": lengths, "mask": mask, "padding_mask": padding_mask}
    provided = [name for name, value in arguments.items() if value is not None]
    if len(provided) != 1:
        names = ", ".join(provided) or "none"
        raise ValueError(f"from_padded: exactly one of lengths, mask and padding_mask must be given, found {names}")
    checks.check_choice("from_padded", "side", side, SIDES)
    if lengths is not None:
        token_mask = mask_from_lengths(lengths, rows, width, side)
    elif side != "right":
        raise ValueError(
            f"from_padded: side must be given with lengths only ({provided[0]} has padding anywhere), found {side!r}"
        )
    else:
        token_mask = as_bool_mask("from_padded", provided[0], arguments[provided[0]], rows, width)
        token_mask = ~token_mask if padding_mask is not None else token_mask
    return layout_of_mask(token_mask)


def layout_of_mask(token_mask: Tensor) -> PaddedLayout:
    """The layout of a padded batch whose tokens are where ``token_mask [B, L]`` (bool) is True."""
    flat = token_mask.flatten()
    index = torch.arange(flat.shape[0], device="meta") if token_mask.is_meta else flat.nonzero().squeeze(1)
    return PaddedLayout(offsets_from_lengths(token_mask.sum(1)), index, token_mask.shape[1])


def from_padded(
    x: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    side: str = "right",
) -> Packed:
    """Pack a padded batch; exactly one of ``lengths``, ``mask``, ``padding_mask`` marks the positions of tokens.

    In PyTorch, ``values = x[mask]`` and ``offsets = [0, cumsum(mask.sum(1))]``; the tokens of a row keep their order,
    whether padding is on the right, on the left or in between.

    Args:
        x: ``[B, L, ...]``, any dtype.
        lengths: ``[B]`` int32 or int64: row ``b`` has this many tokens, at the start of the row (``side="right"``: the
            padding is on the right) or at its end (``side="left"``).
        mask: ``[B, L]`` bool, or integers 0 and 1 (Hugging Face's ``attention_mask``): True marks a **token**.
        padding_mask: ``[B, L]``, likewise, with the other polarity (``key_padding_mask`` of
            ``torch.nn.MultiheadAttention``): True marks **padding**.
        side: the side of the padding, with ``lengths`` only.

    Returns:
        ``(values [T, ...], offsets [B+1] int64, layout)``. ``layout.pad(values)`` is the inverse;
        ``layout.pack(other)`` packs further tensors of the same layout without reading the mask again.
        ``B == 0``, ``L == 0`` and rows that are all padding (empty rows) are allowed.

    Raises:
        TypeError: ``x`` is not a tensor, lengths are not integers, or a mask is floating point (an additive mask).
        ValueError: none or several of the three are given, or a shape, device or value is wrong: a length below 0 or
            beyond ``L``, an integer mask with values other than 0 and 1.
    """
    _check_tensor("from_padded", "x", x, min_axes=2)
    for name, tensor in (("lengths", lengths), ("mask", mask), ("padding_mask", padding_mask)):
        if isinstance(tensor, Tensor):
            _check_device("from_padded", name, tensor, x.device)
    layout = padded_layout(x.shape[0], x.shape[1], lengths=lengths, mask=mask, padding_mask=padding_mask, side=side)
    return Packed(layout.pack(x), layout.offsets, layout)


def to_padded(
    values: Tensor,
    offsets: Tensor,
    *,
    max_length: int | None = None,
    padding_value: float = 0.0,
    side: str = "right",
) -> Tensor:
    """Pad a jagged batch: row ``b`` of the result is row ``b`` of the input, with padding after (or before) it.

    To restore the positions of tokens in a batch packed by :func:`from_padded`, use its ``layout.pad(values)``.

    Args:
        values: ``[T, ...]``, any dtype.
        offsets: ``[B+1]`` int32 or int64. The tail (tokens from ``offsets[B]`` on) is dropped and gets zero gradients.
        max_length: ``L``; None takes the length of the longest row.
        padding_value: the value of padding.
        side: ``"right"`` or ``"left"``: the side of the padding.

    Returns:
        ``[B, L, ...]`` in the values' dtype.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: a shape, device or offset is wrong, or a row is longer than ``max_length`` (rows are not truncated).
    """
    op = "to_padded"
    rows = _check_jagged(op, values, offsets)
    checks.check_choice(op, "side", side, SIDES)
    lengths = offsets.diff()
    if offsets.is_meta:
        longest = values.shape[0] if max_length is None and rows else 0
    else:
        longest = int(lengths.max()) if rows else 0
    width = longest if max_length is None else checks.check_count(op, "max_length", max_length)
    if longest > width:
        row = int(lengths.argmax())
        raise ValueError(f"{op}: max_length must be at least {longest}, the length of row {row}, found {width}")
    token_row, position = _row_and_position(offsets, values.shape[0])
    if side == "left":
        position = position + (width - lengths[token_row])
    return _scatter(values[: position.shape[0]], token_row * width + position, rows, width, padding_value)


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """``[0, cumsum(lengths)]``: ``[B]`` integers to offsets ``[B+1]`` int64.

    Raises:
        TypeError: not an int32 or int64 tensor. ValueError: not one axis, or (on CPU; elsewhere with
            ``set_validation("full")``; not in compiled programs) a length below 0.
    """
    op = "offsets_from_lengths"
    checks.check_index(op, "lengths", lengths, getattr(lengths, "device", torch.device("cpu")))
    # A compiled graph cannot read the lengths; the op that takes the offsets then refuses decreasing ones.
    readable = checks.validates(lengths.device) and not torch.compiler.is_compiling()
    if readable and lengths.numel() and int(lengths.min()) < 0:
        row = int(lengths.argmin())
        raise ValueError(f"{op}: lengths[{row}] must be at least 0, found {int(lengths[row])}")
    return torch.cat((lengths.new_zeros(1, dtype=torch.int64), lengths.cumsum(0, dtype=torch.int64)))


def from_nested(nested: Tensor) -> Jagged:
    """A nested tensor ``[B, j, ...]`` of layout ``torch.jagged`` as ``(values [T, ...], offsets [B+1])``.

    No copy is made, unless the rows have gaps between them (nested tensors with lengths, as made by ``narrow``); such
    rows are packed.

    Raises:
        TypeError: not a nested tensor of layout ``torch.jagged``. ValueError: the ragged axis is not axis 1.
    """
    if not isinstance(nested, Tensor) or not nested.is_nested or nested.layout is not torch.jagged:
        found = f"a nested tensor of layout {nested.layout}" if _is_nested(nested) else checks.describe(nested)
        raise TypeError(f"from_nested: nested must be a nested tensor of layout torch.jagged, found {found}")
    if nested.dim() < 2 or not isinstance(nested.shape[1], torch.SymInt):
        raise ValueError(f"from_nested: nested must have its ragged axis at 1, found shape {list(nested.shape)}")
    # These accessors exist only on the subclass of nested tensors, which is invisible to type checkers.
    untyped: Any = nested
    values, offsets, lengths = untyped.values(), untyped.offsets(), untyped.lengths()
    if lengths is None:
        return Jagged(values, offsets)
    packed_offsets = offsets_from_lengths(lengths)
    row, position = _row_and_position(packed_offsets, values.shape[0])
    return Jagged(values.index_select(0, offsets[row] + position), packed_offsets)


def to_nested(values: Tensor, offsets: Tensor) -> Tensor:
    """``values [T, ...]`` and ``offsets [B+1]`` as a nested tensor ``[B, j, ...]`` of layout ``torch.jagged``; no copy.

    The tail (tokens from ``offsets[B]`` on) is dropped. ``B == 0`` is refused: PyTorch has no such nested tensor.

    Raises:
        TypeError: an argument is of the wrong kind. ValueError: a shape, device or offset is wrong, or there is no row.
    """
    if not _check_jagged("to_nested", values, offsets):
        raise ValueError(f"to_nested: offsets must hold at least one row, found shape {list(offsets.shape)}")
    return torch.nested.nested_tensor_from_jagged(values[: _tokens(offsets, values.shape[0])], offsets)


def from_torchrec(jagged: Any) -> Jagged:
    """A TorchRec ``JaggedTensor``, or anything with ``values()`` and ``offsets()`` or ``lengths()``, unpacked.

    TorchRec itself is not needed. Weights of the tensor are dropped. A ``KeyedJaggedTensor`` is converted key by key:
    ``from_torchrec(keyed["item"])``.

    Raises:
        TypeError: there is no ``values()``, or neither ``offsets()`` nor ``lengths()``, or several keys.
        ValueError: the offsets are wrong.
    """
    op = "from_torchrec"
    if hasattr(jagged, "keys"):
        raise TypeError(f"{op}: jagged must be the tensor of one key (keyed[name]), found {type(jagged).__name__}")
    methods = [name for name in ("values", "offsets", "lengths") if callable(getattr(jagged, name, None))]
    if "values" not in methods or len(methods) < 2:
        expected = "an object with values() and offsets() or lengths()"
        raise TypeError(
            f"{op}: jagged must be {expected}, found {type(jagged).__name__} with {methods or 'none of them'}"
        )
    values = jagged.values()
    offsets = jagged.offsets() if "offsets" in methods else offsets_from_lengths(jagged.lengths())
    if isinstance(offsets, Tensor) and offsets.shape == (0,):  # TorchRec's `JaggedTensor.empty()` has no row
        offsets = offsets.new_zeros(1)
    _check_jagged(op, values, offsets)
    return Jagged(values, offsets)


def to_torchrec(values: Tensor, offsets: Tensor, kind: type[_Other]) -> _Other:
    """``kind(values=values, offsets=offsets)``, checked; ``kind`` is ``torchrec.JaggedTensor``, which is not imported.

    The tail is dropped, because in TorchRec all values belong to rows.

    Raises:
        TypeError: an argument is of the wrong kind. ValueError: a shape, device or offset is wrong.
    """
    op = "to_torchrec"
    _check_jagged(op, values, offsets)
    if not callable(kind):
        raise TypeError(f"{op}: kind must be a class such as torchrec.JaggedTensor, found {checks.describe(kind)}")
    return kind(values=values[: _tokens(offsets, values.shape[0])], offsets=offsets)  # type: ignore[call-arg]


# ---------------------------------------------------------------- checks and helpers


def _is_nested(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_nested


def _check_tensor(op: str, name: str, x: object, min_axes: int = 1) -> None:
    if not isinstance(x, Tensor) or not checks.is_dense(x):
        found = checks.describe(x) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} must be a tensor (not nested), found {found}")
    if x.dim() < min_axes:
        expected = "[B, L, ...]" if min_axes == 2 else "[T, ...]"
        raise ValueError(f"{op}: {name} must be {expected}, found shape {list(x.shape)}")


def _check_device(op: str, name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on device {device}, found {x.device}")


def _check_jagged(op: str, values: Tensor, offsets: Tensor) -> int:
    """Check ``values [T, ...]`` and their offsets; returns ``B``."""
    _check_tensor(op, "values", values)
    rows = checks.check_offsets(op, "offsets", offsets, values.device)
    checks.check_offsets_content(op, "offsets", offsets, values.shape[0])
    return rows


def mask_from_lengths(lengths: Tensor, rows: int, width: int, side: str, op: str = "from_padded") -> Tensor:
    """The mask ``[B, L]``, True at tokens, of rows with these lengths; ``op`` is the caller's name for errors."""
    checks.check_index(op, "lengths", lengths, getattr(lengths, "device", torch.device("cpu")))
    if lengths.shape[0] != rows:
        raise ValueError(f"{op}: lengths must be [B = {rows}], found shape {list(lengths.shape)}")
    wrong = (lengths < 0) | (lengths > width)
    if checks.validates(lengths.device) and bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise ValueError(f"{op}: lengths[{row}] must be from 0 to L = {width}, found {int(lengths[row])}")
    position = torch.arange(width, device=lengths.device)
    start = 0 if side == "right" else (width - lengths)[:, None]
    return (position >= start) & (position < start + lengths[:, None])


def as_bool_mask(op: str, name: str, mask: object, rows: int, width: int) -> Tensor:
    """A mask ``[B, L]`` of bool, or of integers 0 and 1, as bool; anything else is refused with errors of ``op``."""
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex() or not checks.is_dense(mask):
        raise TypeError(f"{op}: {name} must be a bool tensor, or integers 0 and 1; found {checks.describe(mask)}")
    if mask.shape != (rows, width):
        raise ValueError(f"{op}: {name} must be [B = {rows}, L = {width}], found shape {list(mask.shape)}")
    if mask.dtype != torch.bool and checks.validates(mask.device) and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"{op}: {name} must hold 0 and 1 only, found values from {int(mask.min())} to {int(mask.max())}"
        )
    return mask.bool()


def _tokens(offsets: Tensor, total: int) -> int:
    """The number of the ``total`` tokens that belong to rows; on ``meta``, which has no data, all of them."""
    return total if offsets.is_meta else int(offsets[-1])


def _row_and_position(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The row ``[T]`` of every token that belongs to a row, and its index in that row ``[T]``, both int64."""
    token = torch.arange(_tokens(offsets, total), device=offsets.device)
    row = torch.searchsorted(offsets[1:].contiguous(), token, right=True)
    return row, token - offsets[row]


def _scatter(values: Tensor, index: Tensor, rows: int, width: int, padding_value: float) -> Tensor:
    """``values [T, ...]`` scattered to ``[rows, width, ...]`` by flat ``index``, with ``padding_value`` elsewhere."""
    fill = _fill(values.dtype, padding_value)
    flat = values.new_full((rows * width, *values.shape[1:]), fill)
    return flat.index_copy(0, index, values).view(rows, width, *values.shape[1:])


def _fill(dtype: torch.dtype, padding_value: object) -> float:
    """A padding value that tensors of this dtype can hold."""
    value = checks.plain("to_padded", "padding_value", padding_value)
    if not isinstance(value, (int, float)):
        raise TypeError(f"to_padded: padding_value must be a number, found {checks.describe(value)}")
    if dtype == torch.bool or dtype.is_complex:
        return value
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
        fits = value != value or value in (torch.inf, -torch.inf) or -largest <= value <= largest
    else:
        fits = torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max and int(value) == value
    if not fits:
        raise ValueError(f"to_padded: padding_value must be a number of {dtype}, found {checks.describe(value)}")
    return value
