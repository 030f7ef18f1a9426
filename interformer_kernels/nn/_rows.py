"""Inputs of the modules: packed rows with offsets, or a padded batch with a mask of either polarity; and their inverse.

The arguments mean the same in every module:

- `offsets [B+1]`: the input is packed, `x [T, E]`, row `b` is `x[offsets[b]:offsets[b+1]]`. Tokens from `offsets[B]` on
  (the tail) are not read, and come out zero.
- `key_padding_mask [B, L]`: the input is padded, and True marks **padding** (as in `torch.nn.MultiheadAttention`).
- `key_mask [B, L]`: the input is padded, and True marks a **token** (as Hugging Face's `attention_mask`).
- `lengths [B]`: the number of tokens of each row; padding follows them. With packed input, `x [T, E]`, the rows follow
  one another.
- none of them: the input has the padded form and no padding.

Masks are bool, or integers 0 and 1. Padding may be on the right, on the left or between tokens; it is not read (it may
hold NaN), and comes out zero. A padded batch is `[B, L, E]` with `batch_first=True`, `[L, B, E]` without.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels.jagged import (
    PaddedLayout,
    as_bool_mask,
    layout_of_mask,
    mask_from_lengths,
    offsets_from_lengths,
)


def equal_offsets(rows: int, length: int, device: torch.device) -> Tensor:
    """Offsets of `rows` rows of equal `length`: a dense batch seen as a packed one."""
    return torch.arange(rows + 1, device=device) * length


@dataclass(frozen=True)
class Rows:
    """The packed tokens of a batch, and how to restore results to the input's form.

    Attributes:
        tokens: `[T, E]`.
        offsets: `[B+1]`.
        dense: `(B, L)` of a padded input; None for packed input.
        layout: positions of the tokens in a padded input; None if it has no padding.
        batch_first: whether a padded input is `[B, L, E]` rather than `[L, B, E]`.
        inside: bool `[T]`, which tokens of a packed input belong to rows; None if all do.
    """

    tokens: Tensor
    offsets: Tensor
    dense: tuple[int, int] | None = None
    layout: PaddedLayout | None = None
    batch_first: bool = True
    inside: Tensor | None = None

    def like(self, x: Tensor) -> Tensor:
        """Another input of the same form (the values for given keys), packed in the same way."""
        if self.dense is None:
            return x if self.inside is None else reference.mask_rows(x, self.inside)
        x = x if self.batch_first else x.transpose(0, 1)
        return x.flatten(0, 1) if self.layout is None else self.layout.pack(x)

    def restore(self, values: Tensor) -> Tensor:
        """`values [T, F]`, one per token, in the input's form; zero at padding and on the tail."""
        if self.dense is None:
            return values if self.inside is None else reference.mask_rows(values, self.inside)
        out = values.unflatten(0, self.dense) if self.layout is None else self.layout.pad(values)
        return out if self.batch_first else out.transpose(0, 1)

    def restore_rows(self, values: Tensor) -> Tensor:
        """`values [B, N, F]`, `N` per row; as `[N, B, F]` if the padded input had the batch second."""
        return values if self.dense is None or self.batch_first else values.transpose(0, 1)


def read_rows(
    op: str,
    name: str,
    x: object,
    width: int,
    *,
    offsets: Tensor | None,
    key_padding_mask: Tensor | None,
    key_mask: Tensor | None,
    batch_first: bool,
    lengths: Tensor | None = None,
    offsets_name: str = "offsets",
) -> Rows:
    """Check and pack one input; `width` is the required size of its last axis, `op` the module's name for errors."""
    masked = key_padding_mask is not None or key_mask is not None or lengths is not None
    plain = isinstance(x, Tensor) and checks.is_dense(x) and x.dim() == 2 and x.shape[1] == width
    if plain and offsets is not None and not masked:
        assert isinstance(x, Tensor)
        return _packed(op, x, offsets, offsets_name)  # as below, for most calls
    arguments = {offsets_name: offsets, "key_padding_mask": key_padding_mask, "key_mask": key_mask, "lengths": lengths}
    named = [argument for argument, value in arguments.items() if value is not None]
    if len(named) > 1:
        raise ValueError(
            f"{op}: at most one of {', '.join(arguments)} can be given (the first means that {name} is packed), "
            f"found {', '.join(named)}"
        )
    if lengths is not None and isinstance(x, Tensor) and x.dim() == 2:
        checks.check_index(op, "lengths", lengths, x.device)
        offsets, offsets_name = offsets_from_lengths(lengths), "[0, *lengths.cumsum(0)]"
    axes = ("T", "E") if offsets is not None else ("B", "L", "E") if batch_first else ("L", "B", "E")
    if not isinstance(x, Tensor) or not checks.is_dense(x):
        raise TypeError(f"{op}: {name} must be a tensor [{', '.join(axes)}] (not nested), found {checks.describe(x)}")
    sizes = checks.Axes(op, E=width)
    sizes.bind(name, x, axes)
    if offsets is not None:
        return _packed(op, x, offsets, offsets_name)
    batch = x if batch_first else x.transpose(0, 1)
    rows, length = batch.shape[:2]
    if not named:
        return Rows(batch.flatten(0, 1), equal_offsets(rows, length, x.device), (rows, length), None, batch_first)
    if lengths is not None:
        checks.check_index(op, "lengths", lengths, x.device)
        mask = mask_from_lengths(lengths, rows, length, "right", op)
    else:
        mask = as_bool_mask(op, named[0], arguments[named[0]], rows, length)
    if mask.device != x.device:
        raise ValueError(f"{op}: {named[0]} must be on {name}'s device {x.device}, found {mask.device}")
    layout = layout_of_mask(~mask if key_padding_mask is not None else mask)
    return Rows(layout.pack(batch), layout.offsets, (rows, length), layout, batch_first)


def _packed(op: str, x: Tensor, offsets: Tensor, offsets_name: str) -> Rows:
    checks.check_offsets(op, offsets_name, offsets, x.device)
    # Whether there is a tail depends on the offsets' values. Where reading them is expensive (it synchronises a GPU or
    # breaks a graph), a tail is assumed.
    readable = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable:
        checks.check_offsets_content(op, offsets_name, offsets, x.shape[0])
        if offsets[-1].item() == x.shape[0]:
            return Rows(x, offsets)
    inside = reference.inside_rows(offsets, x.shape[0])
    return Rows(reference.mask_rows(x, inside), offsets, inside=inside)
