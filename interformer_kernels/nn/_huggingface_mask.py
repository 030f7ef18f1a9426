"""The attention mask handed to transformers' layers: a mask of all pairs whose entries are computed only when read."""

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

from interformer_kernels.nn._huggingface_patterns import OPEN, closure_of, is_shift_invariant, last_part, pattern_of
from interformer_kernels.nn._notices import warn_once

NAME = "interformer"


@dataclass(frozen=True)
class MaskForm:
    """A mask that the ops can serve without its entries.

    Attributes:
        causal: a query sees no later key; the last query is aligned with the last key.
        window: `(left, right)`, the farthest keys that a query sees; -1 leaves a side open.
        tokens: `[B, Lk]`, True at keys that are tokens; None if all are.
        rows: int `[B, L]`, the row of each packed token; None if the mask function has no packed rows.
    """

    causal: bool
    tokens: Tensor | None = None
    window: tuple[int, int] = OPEN
    rows: Tensor | None = None


@dataclass
class MaskInfo:
    """The description of one mask, shared by all its views.

    Attributes:
        arguments: arguments of transformers' mask functions, which compute its entries.
        form: the form that the ops can serve; None for a mask of another form.
        knows_rows: the mask function has packed rows, so that position ids need not be searched for them.
        shift_invariant: once the rows of a packed batch are masked from one another, each row is masked as if it were
            alone.
        exposed: the entries' memory has been handed out, so other code may have written to it.
        offsets: the layers' position ids and the offsets of packed rows found in them, cached after the first layer.
    """

    arguments: dict[str, Any]
    form: MaskForm | None
    knows_rows: bool
    shift_invariant: bool
    exposed: bool = False
    offsets: tuple[Tensor, Tensor | None] | None = None
    _visible: Tensor | None = field(default=None, repr=False)
    _additive: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.form is None:  # Computed at once, because a static cache later changes the tensor of query positions.
            self.visible()

    @property
    def additive(self) -> Tensor:
        """`[B, 1, Lq, Lk]` as added by transformers' eager attention: 0, and the dtype's minimum where masked out."""
        if self._additive is None:
            dtype, visible = self.arguments["dtype"], self.visible()
            self._additive = torch.where(visible, visible.new_zeros((), dtype=dtype), torch.finfo(dtype).min)
        return self._additive

    def visible(self) -> Tensor:
        """bool `[B, 1, Lq, Lk]`: True where a query sees a key."""
        if self._visible is None:
            self._visible = masking_utils.sdpa_mask(**self.arguments)
            assert self._visible is not None  # The arguments allow neither skip.
        return self._visible


class PairMask(Tensor):
    """The mask of transformers' eager attention, `[B, 1, Lq, Lk]`, without memory of its own.

    Models pass it to their layers, and those to :func:`huggingface.attention`, which reads `info`. Any other code that
    adds, slices or compares it (models with their own attention do) gets the numbers of eager attention's mask.
    """

    info: MaskInfo
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, info: MaskInfo, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> PairMask:
        mask: PairMask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=torch.device(device))
        mask.info = info
        return mask

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PairMask({list(self.shape)}, {self.info.form})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute the entries for any operation, except that a full slice or a detached mask stays a `PairMask`."""
        first = args[0] if args else None
        if isinstance(first, PairMask) and _is_identity(func, first, *args[1:], **(kwargs or {})):
            return PairMask(first.info, tuple(first.shape), first.dtype, first.device)
        if isinstance(first, PairMask) and func is torch.ops.aten._to_copy.default and not first.info.exposed:
            dtype, device = kwargs.get("dtype") or first.dtype, kwargs.get("device") or first.device
            if dtype.is_floating_point and device == first.device:  # A cast, as mixed precision applies to inputs.
                info = replace(first.info, arguments={**first.info.arguments, "dtype": dtype}, _additive=None)
                return PairMask(info, tuple(first.shape), dtype, device)
        aliases = any(argument.alias_info is not None for argument in func._schema.arguments)

        def entries(mask: PairMask) -> Tensor:
            mask.info.exposed |= aliases
            return mask.info.additive

        warn_once(f"attn_implementation={NAME!r}: the model changes its attention mask; transformers' sdpa serves it")
        dense, options = tree_map_only(PairMask, entries, (args, kwargs or {}))
        result = func(*dense, **options)
        return first if func._schema.is_mutable and isinstance(first, PairMask) else result


def _is_identity(func: Any, mask: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether an operation returns the mask unchanged."""
    if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        return True
    if func is not torch.ops.aten.slice.Tensor or kwargs:
        return False
    slice_arguments: tuple[Any, ...] = (*args, *(0, None, None, 1)[len(args) :])
    dim, start, end, step = slice_arguments
    return not start and step == 1 and (end is None or end >= mask.shape[dim])


# ---------------------------------------------------------------- the mask, made once for all layers of a model


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
    """A :class:`PairMask`; under a tracer an eager mask, or None where transformers' `sdpa` would need no mask."""
    arguments: dict[str, Any] = {
        **options,
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "dtype": dtype,
        "device": device,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
    }
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    if is_tracing(attention_mask) or torch.device(device).type == "meta":
        return _traced(arguments, aligned, options)
    causal, window, rows, reason = pattern_of(mask_function, kv_length + kv_offset)
    if not reason and causal and not aligned:
        reason = "a static cache, which has keys after the last query"
    if not reason and attention_mask is not None and attention_mask.dim() != 2:
        reason = f"a padding mask of {attention_mask.dim()} axes"
    form = None
    if reason:
        warn_once(f"attn_implementation={NAME!r}: transformers' sdpa serves {reason}")
    else:
        form = MaskForm(causal, _token_mask(attention_mask, kv_length, kv_offset), window, rows)
        if window != OPEN and has_holes(form.tokens):
            warn_once(f"attn_implementation={NAME!r}: transformers' sdpa serves a window over padding with holes")
            form = None
    of_rows = closure_of(last_part(mask_function), masking_utils.packed_sequence_mask_function)
    knows_rows = rows is not None or of_rows != {}
    info = MaskInfo(arguments, form, knows_rows, is_shift_invariant(mask_function))
    return PairMask(info, (batch_size, 1, q_length, kv_length), dtype, device)


def _traced(arguments: dict[str, Any], aligned: bool, options: dict[str, Any]) -> Tensor | None:
    """The mask in a graph, where nothing can depend on the contents of the attention mask."""
    plain = arguments["attention_mask"] is None and aligned
    skips = options.get("allow_is_causal_skip", False), options.get("allow_is_bidirectional_skip", False)
    if plain and declares_sdpa(type(options.get("config"))):
        function, q_length = arguments["mask_function"], arguments["q_length"]
        square = q_length == 1 or q_length == arguments["kv_length"]
        if function is masking_utils.causal_mask_function and skips[0] and square:
            return None
        if function is masking_utils.bidirectional_mask_function and skips[1]:
            return None
    reason = "padding" if arguments["attention_mask"] is not None else "a mask"
    warn_once(
        f"attn_implementation={NAME!r}: transformers' sdpa serves {reason} under torch.compile, where the number of "
        "tokens would depend on data"
    )
    eager_mask: Tensor = masking_utils.eager_mask(**arguments)
    return eager_mask


@functools.cache
def _declares_sdpa(kind: type) -> bool:
    module_name = kind.__module__.replace(".configuration_", ".modeling_")
    module = sys.modules.get(module_name)
    members = () if module is None else vars(module).values()
    models = [m for m in members if isinstance(m, type) and issubclass(m, PreTrainedModel)]
    defined_there = [m for m in models if m.__module__ == module_name]
    return bool(defined_there) and all(m._supports_sdpa for m in defined_there)


def declares_sdpa(kind: type) -> bool:
    """Whether the models of a class of configs declare `sdpa` support, and so interpret a missing mask as it does."""
    return _declares_sdpa(kind)


declares_sdpa._dynamo_marked_constant = True  # type: ignore[attr-defined]  # As in `_notices`.


def _token_mask(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """bool `[B, Lk]`, True at keys that are tokens; None if all are."""
    if attention_mask is None:
        return None
    tokens = F.pad(attention_mask.bool(), (0, max(kv_offset + kv_length - attention_mask.shape[1], 0)))
    tokens = tokens[:, kv_offset : kv_offset + kv_length]
    return None if bool(tokens.all()) else tokens


def has_holes(tokens: Tensor | None) -> bool:
    """Whether padding lies between tokens `[B, L]` of a row, so that their distances are not those of packed ones."""
    if tokens is None:
        return False
    starts = tokens[:, :1].int().sum(1) + (tokens[:, 1:] & ~tokens[:, :-1]).sum(1)
    return bool((starts > 1).any())


def with_packed_rows(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers' preprocessing of a mask's arguments, extended to find packed rows beside an empty cache too.

    Transformers searches position ids for packed rows only if there is no cache; but models create one by default, and
    the rows would see one another. Transformers' own treatment of the rows found is exact under every mask.
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
        preprocessed = preprocess(config, inputs_embeds, attention_mask, cache, position_ids, *args, **kwargs)
        early_exit, padding, row_ids, q_length, kv_length, q_offset, kv_offset = preprocessed
        if early_exit or row_ids is not None or config._attn_implementation != NAME:
            return preprocessed
        if not isinstance(position_ids, Tensor) or is_tracing(position_ids) or position_ids.device.type == "meta":
            return preprocessed
        positions = query_positions(position_ids, inputs_embeds.shape[0], q_length)
        if padding is None and isinstance(q_offset, int) and q_offset > 0:
            refuse_new_row_after_cache(position_ids, q_offset)
        if positions is None:
            return preprocessed
        if padding is not None:
            refuse_restarts_with_padding(positions, padding, q_length)
        elif row_starts(positions, causal=True, no_cache=q_length == kv_length) is not None:
            row_ids = masking_utils.find_packed_sequence_indices(positions.expand(inputs_embeds.shape[0], -1))
        return early_exit, padding, row_ids, q_length, kv_length, q_offset, kv_offset

    _preprocess_mask_arguments._finds_rows = True  # type: ignore[attr-defined]
    return _preprocess_mask_arguments


# ---------------------------------------------------------------- packed rows given by position ids

_AMBIGUOUS = "must rise by 1 where they do not restart for a packed row"


def query_positions(position_ids: object, batch: int, queries: int) -> Tensor | None:
    """Position ids `[B or 1, L]` of the queries; None without them, or if there is one query."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or queries < 2:
        return None
    fits = position_ids.shape[1] == queries and position_ids.shape[0] in (1, batch)
    return position_ids if fits else None


def row_starts(positions: Tensor, causal: bool, no_cache: bool) -> Tensor | None:
    """bool `[B or 1, L-1]`, True where a token after the first starts a row; None if all are of one row.

    `no_cache` means that the keys are these tokens only.
    """
    steps = positions.diff(dim=1)
    if bool((steps == 1).all()):
        return None
    place = f"attn_implementation={NAME!r}: position_ids"
    if not causal:
        # Bidirectional attention does not depend on positions; only those of the exact form of packed rows are refused.
        if bool(((steps == 1) | (positions[:, 1:] == 0)).all()) and bool((positions[:, 0] == 0).all()):
            raise ValueError(
                f"{place} restart in bidirectional attention; give packed rows by cu_seq_lens_q and cu_seq_lens_k"
            )
        return None
    if not no_cache:
        raise ValueError(f"{place} {_AMBIGUOUS}: queries with a filled or static cache must be of one row")
    if bool((steps > 0).all()):
        raise ValueError(f"{place} {_AMBIGUOUS}, found a gap; pass an attention_mask if all tokens are of one row")
    return steps != 1


def refuse_restarts_with_padding(positions: Tensor, padding: Tensor, queries: int) -> None:
    """Refuse an ambiguous input: flash attention would treat it as packed rows, `sdpa` as one row."""
    if padding.dim() != 2 or padding.shape[1] < queries:
        return
    tokens = padding[:, -queries:].bool()
    restarts = (positions[:, 1:] == 0) & (positions.diff(dim=1) != 1)
    if bool((restarts & tokens[:, 1:] & tokens[:, :-1]).any()):
        raise ValueError(
            f"attn_implementation={NAME!r}: position_ids restart beside an attention_mask; pass packed rows without "
            "attention_mask, or with cu_seq_lens_q and cu_seq_lens_k"
        )


def refuse_new_row_after_cache(position_ids: Tensor, filled: int) -> None:
    """Refuse queries whose positions are below the cache's length: they would see the cache's other rows too."""
    if position_ids.dim() == 2 and bool((position_ids[:, :1] < filled).any()):
        raise ValueError(
            f"attn_implementation={NAME!r}: position_ids after a cache of {filled} tokens must continue from there, "
            f"found {int(position_ids[:, 0].min())}: rows packed in a cache see one another (or pass an attention_mask)"
        )


def refuse_gaps_in_a_graph(positions: Tensor) -> None:
    """Assert positions without gaps inside a graph, where they cannot be read before it runs."""
    torch._assert_async((positions.diff(dim=1) == 1).all(), f"position_ids {_AMBIGUOUS}, under torch.compile")
