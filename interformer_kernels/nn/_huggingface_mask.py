"""What transformers' layers are told of who sees whom: a mask of all pairs, written out only where it is read."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, masking_utils
from transformers.utils.import_utils import is_tracing

from interformer_kernels.nn._notices import say_once

NAME = "interformer"


@dataclass(frozen=True)
class Form:
    """A mask that the ops serve without its pairs.

    Attributes:
        causal: a query sees no later key; the last query stands at the last key.
        tokens: `[B, Lk]`, True at keys that are tokens; None where all are.
        rows: int `[B, L]`, the row of each packed token; None where the mask function knows of no packed rows.
    """

    causal: bool
    tokens: Tensor | None = None
    rows: Tensor | None = None


@dataclass
class Pairs:
    """All that is known of one mask; its views share it.

    Attributes:
        arguments: of transformers' mask functions, which write it out.
        form: what the ops can serve; None for a mask of another form.
        told_apart: the mask function knows packed rows, so that positions need not be asked for them.
        shifts: with the rows of a packed batch hidden from one another, each row is masked as if it stood alone.
        read: the pairs have been handed out as they lie in memory, and may have been written to.
        offsets: of the packed rows found in the layers' position ids, with these; they are looked at once.
    """

    arguments: dict[str, Any]
    form: Form | None
    told_apart: bool
    shifts: bool
    read: bool = False
    offsets: tuple[Tensor, Tensor | None] | None = None
    _seen: Tensor | None = field(default=None, repr=False)
    _added: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.form is None:  # At once: a static cache goes on counting in the tensor that says where queries stand.
            self.seen()

    @property
    def added(self) -> Tensor:
        """`[B, 1, Lq, Lk]` as transformers' eager attention adds it: 0, and the dtype's least where nothing is seen."""
        if self._added is None:
            dtype, seen = self.arguments["dtype"], self.seen()
            self._added = torch.where(seen, seen.new_zeros((), dtype=dtype), torch.finfo(dtype).min)
        return self._added

    def seen(self) -> Tensor:
        """bool `[B, 1, Lq, Lk]`: True where a query sees a key."""
        if self._seen is None:
            self._seen = masking_utils.sdpa_mask(**self.arguments)
            assert self._seen is not None  # Neither skip is allowed.
        return self._seen


class PairMask(Tensor):
    """The mask of transformers' eager attention, `[B, 1, Lq, Lk]`, without memory of its own.

    Models hand it to their layers, and those to :func:`huggingface.attention`, which looks at `pairs`. Code that adds,
    slices or compares it, as models do that attend by themselves, gets the numbers that it got from eager attention.
    """

    pairs: Pairs
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, pairs: Pairs, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> PairMask:
        made: PairMask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device(device))
        made.pairs = pairs
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PairMask({list(self.shape)}, {self.pairs.form})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Write the pairs out for any operation; a slice of all of them, and a detached mask, are the mask itself."""
        first = args[0] if args else None
        if isinstance(first, PairMask) and _keeps_all(func, first, *args[1:], **(kwargs or {})):
            return PairMask(first.pairs, tuple(first.shape), first.dtype, first.device)
        if isinstance(first, PairMask) and func is torch.ops.aten._to_copy.default and not first.pairs.read:
            dtype, device = kwargs.get("dtype") or first.dtype, kwargs.get("device") or first.device
            if dtype.is_floating_point and device == first.device:  # A copy, as mixed precision makes it of inputs.
                pairs = replace(first.pairs, arguments={**first.pairs.arguments, "dtype": dtype}, _added=None)
                return PairMask(pairs, tuple(first.shape), dtype, device)
        aliases = any(argument.alias_info is not None for argument in func._schema.arguments)

        def written_out(mask: PairMask) -> Tensor:
            mask.pairs.read |= aliases
            return mask.pairs.added

        say_once(f"attn_implementation={NAME!r}: a model works on its mask itself; sdpa serves what it makes of it")
        dense, options = tree_map_only(PairMask, written_out, (args, kwargs or {}))
        found = func(*dense, **options)
        return first if func._schema.is_mutable and isinstance(first, PairMask) else found


def _keeps_all(func: Any, mask: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether an operation leaves a mask as it is."""
    if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        return True
    if func is not torch.ops.aten.slice.Tensor or kwargs:
        return False
    given: tuple[Any, ...] = (*args, *(0, None, None, 1)[len(args) :])
    dim, start, end, step = given
    return not start and step == 1 and (end is None or end >= mask.shape[dim])


# ---------------------------------------------------------------- the mask, made once for all layers


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """A :class:`PairMask`; under a tracer its numbers, or None where transformers' `sdpa` would do without them."""
    sizes: dict[str, Any] = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    places: dict[str, Any] = {"q_offset": q_offset, "kv_offset": kv_offset, "dtype": dtype, "device": device}
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    given: dict[str, Any] = {"mask_function": mask_function, "attention_mask": attention_mask}
    arguments = {**options, **sizes, **places, **given, **skips}
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    if is_tracing(attention_mask) or torch.device(device).type == "meta":
        return _traced(arguments, aligned, options)
    causal, rows, why = _pattern(mask_function, kv_length + kv_offset)
    if not why and causal and not aligned:
        why = "a static cache, whose keys go on behind the queries"
    if not why and attention_mask is not None and attention_mask.dim() != 2:
        why = f"a padding mask of {attention_mask.dim()} axes"
    form = None
    if why:
        say_once(f"attn_implementation={NAME!r}: transformers' sdpa serves {why}")
    else:
        form = Form(causal, _tokens(attention_mask, kv_length, kv_offset), rows)
    told = rows is not None or _closure(_last(mask_function), masking_utils.packed_sequence_mask_function) != {}
    pairs = Pairs(arguments, form, told, _shifts(mask_function))
    return PairMask(pairs, (batch_size, 1, q_length, kv_length), dtype, device)


def _traced(arguments: dict[str, Any], aligned: bool, options: dict[str, Any]) -> Tensor | None:
    """The mask for a graph, in which nothing can depend on the contents of another one."""
    plain = arguments["attention_mask"] is None and aligned
    skips = options.get("allow_is_causal_skip", False), options.get("allow_is_bidirectional_skip", False)
    if plain and declares_sdpa(type(options.get("config"))):
        function, q_length = arguments["mask_function"], arguments["q_length"]
        square = q_length == 1 or q_length == arguments["kv_length"]
        if function is masking_utils.causal_mask_function and skips[0] and square:
            return None
        if function is masking_utils.bidirectional_mask_function and skips[1]:
            return None
    why = "padding" if arguments["attention_mask"] is not None else "a mask"
    say_once(
        f"attn_implementation={NAME!r}: transformers' sdpa serves {why} under torch.compile, where the number of "
        "tokens would be data"
    )
    found: Tensor = masking_utils.eager_mask(**arguments)
    return found


@functools.cache
def _declares_sdpa(kind: type) -> bool:
    module = sys.modules.get(kind.__module__.replace(".configuration_", ".modeling_"))
    found = () if module is None else vars(module).values()
    models = [m for m in found if isinstance(m, type) and issubclass(m, PreTrainedModel)]
    own = [m for m in models if m.__module__ == kind.__module__.replace(".configuration_", ".modeling_")]
    return bool(own) and all(m._supports_sdpa for m in own)


def declares_sdpa(kind: type) -> bool:
    """Whether the models of a class of configs say that they understand a missing mask as `sdpa` does."""
    return _declares_sdpa(kind)


declares_sdpa._dynamo_marked_constant = True  # type: ignore[attr-defined]  # As in `_notices`.


def _tokens(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Which keys are tokens, `[B, Lk]`; None where all are."""
    if attention_mask is None:
        return None
    held = F.pad(attention_mask.bool(), (0, max(kv_offset + kv_length - attention_mask.shape[1], 0)))
    held = held[:, kv_offset : kv_offset + kv_length]
    return None if bool(held.all()) else held


def with_rows(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers' look at the arguments of a mask, which finds packed rows beside an empty cache, too.

    It asks position ids for them only where there is no cache; but models make one by default, and their rows would see
    one another. What transformers does with the rows then is exact under every mask.
    """

    @functools.wraps(preprocess)
    def _preprocess_mask_arguments(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Any,
        cache: Any,
        position_ids: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        found = preprocess(config, inputs_embeds, attention_mask, cache, position_ids, *args, **kwargs)
        early_exit, padding, known, q_length, kv_length, q_offset, kv_offset = found
        if early_exit or known is not None or config._attn_implementation != NAME:
            return found
        if not isinstance(position_ids, Tensor) or is_tracing(position_ids) or position_ids.device.type == "meta":
            return found
        positions = positions_of(position_ids, inputs_embeds.shape[0], q_length)
        if padding is None and isinstance(q_offset, int) and q_offset > 0:
            refuse_a_row_of_its_own(position_ids, q_offset)
        if positions is None:
            return found
        if padding is not None:
            refuse_beside_padding(positions, padding, q_length)
        elif starts_anew(positions, causal=True, alone=q_length == kv_length) is not None:
            known = masking_utils.find_packed_sequence_indices(positions.expand(inputs_embeds.shape[0], -1))
        return early_exit, padding, known, q_length, kv_length, q_offset, kv_offset

    _preprocess_mask_arguments._finds_rows = True  # type: ignore[attr-defined]
    return _preprocess_mask_arguments


# ---------------------------------------------------------------- rows that position ids tell apart

_AMBIGUOUS = "must rise by 1 where they do not start packed rows anew"


def positions_of(position_ids: object, batch: int, queries: int) -> Tensor | None:
    """Position ids `[B or 1, L]` of the queries, more than one; None where there are none."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or queries < 2:
        return None
    fits = position_ids.shape[1] == queries and position_ids.shape[0] in (1, batch)
    return position_ids if fits else None


def starts_anew(positions: Tensor, causal: bool, alone: bool) -> Tensor | None:
    """Which tokens behind the first start a row, `[B or 1, L-1]`; None where all are of one row.

    `alone` says that the keys are these tokens only.
    """
    steps = positions.diff(dim=1)
    if bool((steps == 1).all()):
        return None
    place = f"attn_implementation={NAME!r}: position_ids"
    if not causal:
        # Positions say nothing of bidirectional attention, unless they look just like those of packed rows.
        if bool(((steps == 1) | (positions[:, 1:] == 0)).all()) and bool((positions[:, 0] == 0).all()):
            raise ValueError(f"{place} start anew in bidirectional attention; tell packed rows by cu_seq_lens_q and _k")
        return None
    if not alone:
        raise ValueError(f"{place} {_AMBIGUOUS}: queries with a filled or static cache must be of one row")
    if bool((steps > 0).all()):
        raise ValueError(f"{place} {_AMBIGUOUS}, found a gap; pass an attention_mask if all tokens are of one row")
    return steps != 1


def refuse_beside_padding(positions: Tensor, padding: Tensor, queries: int) -> None:
    """Flash attention would take these rows for packed, `sdpa` for one: neither is known to be meant."""
    if padding.dim() != 2 or padding.shape[1] < queries:
        return
    tokens = padding[:, -queries:].bool()
    anew = (positions[:, 1:] == 0) & (positions.diff(dim=1) != 1)
    if bool((anew & tokens[:, 1:] & tokens[:, :-1]).any()):
        raise ValueError(
            f"attn_implementation={NAME!r}: position_ids start anew beside an attention_mask; pass packed rows without "
            "attention_mask, or with cu_seq_lens_q and cu_seq_lens_k"
        )


def refuse_a_row_of_its_own(position_ids: Tensor, filled: int) -> None:
    """Queries behind a cache see all of it; where they stand nearer to their start, it holds other rows, too."""
    if position_ids.dim() == 2 and bool((position_ids[:, :1] < filled).any()):
        raise ValueError(
            f"attn_implementation={NAME!r}: position_ids behind a cache of {filled} tokens must go on from there, "
            f"found {int(position_ids[:, 0].min())}: rows packed in a cache see one another (or pass an attention_mask)"
        )


def refuse_gaps_in_a_graph(positions: Tensor) -> None:
    """In a graph positions cannot be looked at before it runs."""
    torch._assert_async((positions.diff(dim=1) == 1).all(), f"position_ids {_AMBIGUOUS}, under torch.compile")


# ---------------------------------------------------------------- mask functions, known by who made them


def _pattern(function: Callable[..., Any], length: int) -> tuple[bool, Tensor | None, str]:
    """Whether the mask function is causal, the rows `[B, L]` of packed tokens, and why it is of another form (or "").

    Mask functions are closures, which say what they hide only pair by pair; so transformers' own are known by the
    function that made them, and all others are of another form.
    """
    if function is masking_utils.causal_mask_function:
        return True, None, ""
    if function is masking_utils.bidirectional_mask_function:
        return False, None, ""
    parts = _parts(function)
    if len(parts) == 2:
        for overlay in (masking_utils.sliding_window_overlay, masking_utils.sliding_window_bidirectional_overlay):
            held = _closure(parts[0], overlay)
            if held and held["sliding_window"] >= length:
                return _pattern(parts[1], length)
        remapped = _closure(parts[0], masking_utils.remap_positions_for_packed_sequence)
        rows = _closure(parts[1], masking_utils.packed_sequence_mask_function)
        if remapped and rows:
            causal, packed, why = _pattern(remapped["mask_function"], length)
            return causal, rows["packed_sequence_mask"], why or ("rows within rows" if packed is not None else "")
    return False, None, "a mask of another form than causal, bidirectional, padded or packed"


def _shifts(function: Callable[..., Any]) -> bool:
    """Whether a mask function looks at distances and marks only: a packed row is then masked as if it stood alone."""
    if function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        return True
    overlays = masking_utils.sliding_window_overlay, masking_utils.sliding_window_bidirectional_overlay
    if any(_closure(function, maker) for maker in (*overlays, masking_utils.blockwise_overlay)):
        return True
    parts = _parts(function) or _closure(function, masking_utils.or_masks).get("mask_functions", ())
    return bool(parts) and all(_shifts(part) for part in parts)


def _parts(function: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    return tuple(_closure(function, masking_utils.and_masks).get("mask_functions", ()))


def _last(function: Callable[..., Any]) -> Callable[..., Any]:
    return (_parts(function) or (function,))[-1]


def _closure(function: Callable[..., Any], maker: Callable[..., Any]) -> dict[str, Any]:
    """What a function that `maker` made holds, by name; empty for a function that it did not make."""
    name = getattr(function, "__qualname__", "")
    closure = getattr(function, "__closure__", None)
    if not name.startswith(f"{maker.__qualname__}.<locals>.") or not closure:
        return {}
    if function.__module__ != maker.__module__:
        return {}
    return {n: cell.cell_contents for n, cell in zip(function.__code__.co_freevars, closure, strict=True)}
