"""Attention masks of `torch.nn.MultiheadAttention` that are causality, a window or padding in disguise."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, Union, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

OTHER_FORM = "an attn_mask that is neither causal nor a window nor padding"
OTHER_HEADS = "an attn_mask whose heads differ"
OTHER_NUMBERS = "an attn_mask with numbers other than 0 and those that hide a key (-inf, or nearly the dtype's least)"
HOLES = "a causal mask or a window together with padding that has holes"
BLIND = "an attn_mask that hides all keys of a query by finite numbers, so that PyTorch lets it see all of them"
CAPTURE = "an attn_mask that cannot be read while a CUDA graph is captured"

# Finite numbers up to this one hide a key as -inf does: a score that could outweigh it would have lost all its digits.
_HIDES = -1e8
# Masks of up to this many elements are compared with a copy, which costs less than 0.05 ms.
_SMALL = 1 << 16

_T = TypeVar("_T")


@dataclass(frozen=True)
class BandMask:
    """A mask of `B` rows that the ops can serve without its entries.

    Query `i` of row `b` sees key `j` if `lower <= j - i <= upper`, `keys[b, j]` and `queries[b, i]`.

    Attributes:
        lower: the farthest key before the query; None if no key is too far. It may be above 0.
        upper: the farthest key after the query; 0 is causality if the first query stands at the first key.
        keys: bool `[B or 1, S]`, False at keys that no query sees; None if there are none.
        queries: bool `[B or 1, L]`, False at queries that see no key; None if there are none.
        finite: some entries that hide a key are finite, so that a query that sees no key must be left to PyTorch.
    """

    lower: int | None = None
    upper: int | None = None
    keys: Tensor | None = None
    queries: Tensor | None = None
    finite: bool = False

    @property
    def has_band(self) -> bool:
        """Whether the distance of a pair matters."""
        return self.lower is not None or self.upper is not None


# A mask's form, or the reason why it has none.
Form = Union[BandMask, str]


# ---------------------------------------------------------------- from entries to a form


def read_form(mask: Tensor, rows: int, heads: int) -> Form:
    """The form of a mask `[L, S]` or `[rows * heads, L, S]`, bool (True hides) or additive; or why it has none.

    All entries are compared with those of the form, so a mask that differs in one entry is never taken for another.
    """
    if mask.dim() == 2:
        mask = mask[None]
    else:
        by_head = mask.unflatten(0, (rows, heads))
        words = _words(by_head)
        if by_head.stride(1) and not torch.equal(words, words[:, :1].expand_as(words)):
            return OTHER_HEADS
        mask = by_head[:, 0]
    if not mask.numel():
        return BandMask()
    finite = False
    if mask.dtype == torch.bool:
        visible = ~mask
    else:
        visible = mask == 0
        finite = not _all(visible | (mask == -torch.inf))
        if finite and not _all(visible | (mask <= max(_HIDES, torch.finfo(mask.dtype).min))):
            return OTHER_NUMBERS
    return _form_of_visible(visible, finite)


def _form_of_visible(visible: Tensor, finite: bool) -> Form:
    """The form of `visible [B or 1, L, S]`.

    If any band, keys and queries give these entries, then those do that are read off here, for they are the narrowest.
    """
    visible = visible.contiguous()
    keys, queries, pairs = (visible.view(torch.uint8).amax(axis).bool() for axis in (1, 2, 0))
    if not bool(pairs.any()):
        return BandMask(keys=keys, queries=queries, finite=finite)
    index = torch.arange(pairs.shape[0], device=pairs.device)
    beyond = pairs.shape[0] + pairs.shape[1]
    nearest, farthest = bounds(pairs)
    first_key, last_key = bounds(keys)
    first_query, last_query = bounds(queries)
    live, some = queries.any(0), keys.any(1)
    # The band, then the distances between the outermost keys and queries of a row: a bound that lies outside of those
    # hides nothing.
    lower, upper, least, most = torch.stack(
        (
            (nearest - index).where(live, beyond).min(),
            (farthest - index).where(live, -beyond).max(),
            (first_key - last_query).where(some, beyond).min(),
            (last_key - first_query).where(some, -beyond).max(),
        )
    ).tolist()
    band = torch.ones_like(pairs).triu_(lower).tril_(upper)
    same = queries[:, :, None] & keys[:, None] & band
    if not torch.equal(_words(same), _words(visible)):
        return OTHER_FORM
    return BandMask(
        lower=lower if lower > least else None,
        upper=upper if upper < most else None,
        keys=None if bool(keys.all()) else keys,
        queries=None if bool(queries.all()) else queries,
        finite=finite,
    )


def _words(x: Tensor) -> Tensor:
    """`x` seen as integers of 8 bytes if it can be; they are compared faster than bools and small floats."""
    steps = x.storage_offset(), x.shape[-1], *x.stride()[:-1]
    whole = x.stride(-1) == 1 and all(step * x.element_size() % 8 == 0 for step in steps)
    return x.view(torch.int64) if whole else x


def _all(x: Tensor) -> bool:
    """`x.all()` of a bool tensor of some elements; the reduction of bytes is faster on CPUs."""
    return bool(x.view(torch.uint8).min())


def bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    """The index of the first and of the last True of each row of bool `[B, n]`, `n > 0`; 0 and n - 1 without any."""
    x = x.byte()
    return x.argmax(1), x.shape[1] - 1 - x.flip(1).argmax(1)


# ---------------------------------------------------------------- with padding


def with_padding(form: BandMask, padding: Tensor | None, rows: int, length: int, device: torch.device) -> Form:
    """The form that hides the keys at `padding [B, S]` too, for `length` queries; or why the ops cannot serve it.

    Its keys are `[B, S]`, or None if all are visible, and have no holes if it has a band.
    """
    keys = form.keys
    if padding is not None:
        keys = ~padding if keys is None else keys & ~padding
    if keys is not None:
        keys = None if bool(keys.all()) else keys.expand(rows, -1)
    form = replace(form, keys=keys)
    if form.has_band and keys is not None and has_holes(~keys):
        return HOLES
    if form.finite and not bool(seeing_queries(form, rows, length, device).all()):
        return BLIND
    return form


def has_holes(padding: Tensor) -> bool:
    """Whether some row has padding between two tokens."""
    token = ~padding
    starts = token[:, :1].sum(1) + (token[:, 1:] & padding[:, :-1]).sum(1)
    return bool((starts > 1).any())


def seeing_queries(form: BandMask, rows: int, length: int, device: torch.device) -> Tensor:
    """bool `[B, L]`: the queries that see some key of a form from :func:`with_padding`."""
    seeing = torch.ones(rows, length, dtype=torch.bool, device=device)
    if form.queries is not None:
        seeing &= form.queries
    if form.keys is None:
        return seeing  # The mask alone hides keys from them, and `queries` has those that see none.
    seeing &= form.keys.any(1, keepdim=True)
    if form.has_band:
        first, last = bounds(form.keys)
        index = torch.arange(length, device=device)
        if form.lower is not None:
            seeing &= index + form.lower <= last[:, None]
        if form.upper is not None:
            seeing &= index + form.upper >= first[:, None]
    return seeing


# ---------------------------------------------------------------- once per mask


@dataclass
class _Seen:
    """The results known of one mask, and how to see that it is still the same."""

    stamp: tuple[Any, ...]
    copy: Tensor | None
    results: dict[Hashable, Any] = field(default_factory=dict)

    def still(self, mask: Tensor, stamp: tuple[Any, ...]) -> bool:
        """Whether the mask has the entries of which the results are."""
        return self.stamp == stamp and (self.copy is None or torch.equal(_words(self.copy), _words(mask)))


_seen = WeakTensorKeyDictionary()


def form_of(mask: Tensor, rows: int, heads: int) -> Form:
    """:func:`read_form`, once per mask."""
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return CAPTURE  # Nor may a form be remembered from before: the graph would ignore what is later written.
    key = "form" if mask.dim() == 2 else (rows, heads)
    return _once(mask, key, lambda: read_form(mask, rows, heads))


def additive_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as 0 and -inf of this dtype; the same tensor at every call with the same mask."""
    return _once(mask, dtype, lambda: torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf))


def _once(mask: Tensor, key: Hashable, make: Callable[[], _T]) -> _T:
    """`make()`, or its result from an earlier call with the same mask, key and entries.

    That entries were written is seen by the tensor's version. Small masks are compared with a copy besides, which also
    sees what was written through `.data`, NumPy or another process. Large masks whose versions do not tell are read
    at every call.
    """
    with torch.inference_mode(False), torch.no_grad():
        if not _is_plain(mask):
            return make()
        small = mask.numel() <= _SMALL and mask.device.type == "cpu"
        tracked = _is_tracked(mask)
        if not small and not tracked:
            return make()
        version = mask._version if tracked else None
        stamp = (version, mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, mask.device)
        seen = _seen.get(mask)
        if seen is None or not seen.still(mask, stamp):
            seen = _seen[mask] = _Seen(stamp, mask.detach().clone() if small else None)
        if key not in seen.results:
            seen.results[key] = make()
        return cast("_T", seen.results[key])


def _is_plain(mask: Tensor) -> bool:
    """Whether results for this mask hold beyond this call: no subclass, and no transform or tracer around the call."""
    return (
        type(mask) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.get_interpreter_stack()
        and not torch._C._len_torch_dispatch_stack()
    )


def _is_tracked(mask: Tensor) -> bool:
    """Whether all writes to the mask raise its version, but for those through `.data`.

    Memory shared with NumPy cannot be resized, which PyTorch notes in either direction.
    """
    if mask.is_inference():
        return False
    storage = mask.untyped_storage()
    return mask.device.type != "cpu" or (storage.resizable() and not storage.is_shared())
