"""Attention of Hugging Face transformers on the ops: `register()`, then `attn_implementation="interformer"`."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from interformer_kernels._launch.tensors import accumulation_dtype
from interformer_kernels.jagged import layout_of_mask
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn import _huggingface_rows as rows
from interformer_kernels.nn._huggingface_mask import (
    NAME,
    MaskForm,
    MaskInfo,
    PairMask,
    has_holes,
    mask,
    with_packed_rows,
)
from interformer_kernels.nn._huggingface_patterns import OPEN
from interformer_kernels.nn._notices import warn_once
from interformer_kernels.ops.gated_cross_attention import gated_cross_attention
from interformer_kernels.ops.jagged_attention import jagged_attention

# Options of a call that change the attention's result, and that the ops do not have.
_UNSERVED = ("attention_bias", "alibi", "head_mask", "indices", "block_indices", "block_table")


def register() -> None:
    """Register ``attn_implementation="interformer"`` with transformers; calling it again changes nothing.

    Then load models with it (``from_pretrained(..., attn_implementation="interformer")``) or switch them to it
    (``model.set_attn_implementation("interformer")``). The ops serve

    - padded batches (``attention_mask [B, L]``, padding left, right or with holes), causal and bidirectional, with and
      without a dynamic cache: padding is skipped. In causal attention, outputs at padding are zero;
    - packed batches, given by ``cu_seq_lens_q`` and ``cu_seq_lens_k`` as for FlashAttention, or, in causal models
      without an ``attention_mask``, by ``position_ids`` that restart. Rows do not see one another, with or without a
      cache, and no mask of all pairs is computed. (In bidirectional models, whose masks do not depend on positions,
      only ``cu_seq_lens`` can give the rows.);
    - grouped heads, without repeating keys;
    - sliding windows, causal and on both sides, of padded and packed batches: keys outside are skipped;
    - dropout in training, ``softcap``, attention sinks (``s_aux``), and position biases that depend on the distance
      alone, as T5's do.

    Masks of another form (chunks, blocks, static caches, windows over padding with holes, your own masks
    ``[B, 1, Lq, Lk]``), other position biases, and padding under ``torch.compile`` take transformers' own ``sdpa``
    path, restricted to packed rows if there are any, which is logged once.

    The following raise a ``ValueError``: classes with their own attention code (when they are loaded); chosen keys
    (``indices``); ``softcap`` and sinks where ``sdpa`` would have to serve, which has neither; packed rows under a mask
    that depends on absolute positions, or in a model that does not pass them to its attention; ``position_ids`` that
    restart beside an ``attention_mask``, in bidirectional attention or after a filled cache. A layer that computes with
    its mask gets the numbers of transformers' ``eager`` mask.

    Transformers has no hook for two of these checks. Therefore ``register`` wraps
    ``PreTrainedModel.get_correct_attn_implementation``, to refuse unsupported classes under this name, and
    ``masking_utils._preprocess_mask_arguments``, to find packed rows beside a cache.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    check = getattr(PreTrainedModel, "get_correct_attn_implementation", None)
    if check is not None and not hasattr(check, "_asks_interformer"):
        PreTrainedModel.get_correct_attn_implementation = _checking_class(check)  # type: ignore[method-assign]
    preprocess = getattr(masking_utils, "_preprocess_mask_arguments", None)
    if preprocess is not None and not hasattr(preprocess, "_finds_rows"):
        masking_utils._preprocess_mask_arguments = with_packed_rows(preprocess)


def _checking_class(check: Any) -> Any:
    """Transformers' `get_correct_attn_implementation`, extended to refuse classes that cannot be served."""

    @functools.wraps(check)
    def get_correct_attn_implementation(self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
        if requested_attention == NAME and (kind := _class_with_own_attention(self.__class__)) is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} cannot serve {type(self).__name__}: {kind.__module__} has attention "
                "code of its own, not transformers' AttentionInterface; use 'eager', or name the parts to be served, "
                f"as in attn_implementation={{'text_config': {NAME!r}}}"
            )
        if requested_attention == NAME:
            rows.check_rows_reach_layers(self)
        return check(self, requested_attention, *args, **kwargs)

    get_correct_attn_implementation._asks_interformer = True  # type: ignore[attr-defined]
    return get_correct_attn_implementation


@functools.cache
def _class_with_own_attention(model: type) -> type | None:
    """The class, among a model's class and its parents, whose file has attention that bypasses the interface.

    The same search as in `PreTrainedModel._can_set_attn_implementation`, except that an unreadable file is accepted.
    """
    for kind in model.__mro__[: model.__mro__.index(PreTrainedModel)]:
        try:
            code = inspect.getsource(sys.modules[kind.__module__])
        except (KeyError, OSError, TypeError):
            continue
        has_attention = re.search(r"^class \w*Attention\w*\(nn\.Module\):", code, re.MULTILINE)
        if has_attention and "ALL_ATTENTION_FUNCTIONS.get_interface(" not in code:
            return kind
    return None


# ---------------------------------------------------------------- the attention of one layer


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`query [B, H, Lq, D]` over `key [B, Hk, Lk, D]`, `value [B, Hk, Lk, Dv]`: `[B, Lq, H, Dv]`, transformers' layout.

    A mask is complete: beside it, the layer's `is_causal` and window are ignored.

    Raises:
        ValueError: an option that cannot be served, or packed rows that cannot be kept apart.
    """
    for name in _UNSERVED:
        if options.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} does not support {name}; use 'eager' or another")
    if options.get("output_attentions"):
        warn_once(f"attn_implementation={NAME!r} returns no attention weights (output_attentions=True); use 'eager'")
    if query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    packed = rows.from_cu_seq_lens(query, key, cu_seq_lens_q, cu_seq_lens_k)
    call = _Call(module, query, key, value, dropout, scaling, options)
    if attention_mask is None:
        return call.without_mask(packed, is_causal, sliding_window), None
    if isinstance(attention_mask, PairMask):
        if attention_mask.shape[0] == query.shape[0] and attention_mask.shape[2:] == (query.shape[2], key.shape[2]):
            return call.with_pair_mask(attention_mask.info, packed), None
        attention_mask = attention_mask.info.additive
    if attention_mask.dim() != 4 or not (attention_mask.is_floating_point() or attention_mask.dtype == torch.bool):
        found = f"{list(attention_mask.shape)} of {attention_mask.dtype}"
        raise ValueError(
            f"attn_implementation={NAME!r}: a mask must be [B, 1, Lq, Lk], bool or floating, found {found}"
        )
    traced = torch.compiler.is_compiling()
    if attention_mask.shape[1:3] == (1, 1) and attention_mask.dtype == torch.bool and packed is None and not traced:
        form = MaskForm(False, attention_mask[:, 0, 0].expand(query.shape[0], -1))
        if call.has_places(form):
            return call.by_ops(form, None), None
    warn_once(f"attn_implementation={NAME!r}: transformers' sdpa serves masks [B, 1, Lq, Lk]")
    return call.by_sdpa(attention_mask, packed), None


class _Call:
    """One call of :func:`attention`: its arguments, and the ways in which it can be served."""

    def __init__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        scaling: float | None,
        options: dict[str, Any],
    ) -> None:
        self.module, self.heads = module, (query, key, value)
        self.queries, self.keys = query.shape[2], key.shape[2]
        self.dropout, self.scaling, self.options = dropout, scaling, options
        self.scores = _Scores(query, key, options)

    def with_pair_mask(self, info: MaskInfo, packed: rows.Packed | None) -> Tensor:
        """Attention under a :class:`PairMask`."""
        if packed is not None and self.queries != self.keys:
            raise ValueError(
                f"attn_implementation={NAME!r}: cu_seq_lens with a mask must have as many keys as queries, "
                f"found {self.queries} queries over {self.keys} keys (a filled cache)"
            )
        query, key, _ = self.heads
        packed = rows.combine(info, packed, query)
        if packed is None and not info.knows_rows:
            packed = rows.from_position_ids(info, self.options.get("position_ids"), query, key)
        if packed is not None and not (info.knows_rows or info.shift_invariant):
            raise ValueError(
                f"attn_implementation={NAME!r}: packed rows are not supported with this mask, which depends on a row's "
                "place in the batch; pass position_ids that restart and no attention_mask, or rows one by one"
            )
        form = None if info.exposed else info.form
        if form is not None and (packed is None or form.tokens is None) and self.has_places(form):
            return self.by_ops(form, packed)
        warn_once(f"attn_implementation={NAME!r}: transformers' sdpa serves masks [B, 1, Lq, Lk]")
        return self.by_sdpa(info.additive if info.exposed else info.visible(), packed)

    def has_places(self, form: MaskForm) -> bool:
        """Whether the ops have the call's position bias, and distances of packed queries and keys are those of the
        padded ones where the call depends on them."""
        if self.scores.has_other_bias:
            return False
        if form.window == OPEN and self.scores.bias is None:
            return True
        return (form.causal or self.queries == self.keys) and not has_holes(form.tokens)

    def by_ops(self, form: MaskForm, packed: rows.Packed | None) -> Tensor:
        """Attention on the ops: of packed rows, a padded batch, or a batch without padding."""
        attend = self._attend(form.causal, form.window)
        q, k, v = (x.transpose(1, 2) for x in self.heads)
        if form.tokens is not None:
            return attend.padded(q, k, v, form.tokens)
        return attend.rows(q, k, v, *(packed or rows.one_row_each(q, k)))

    def _attend(self, causal: bool, window: tuple[int, int]) -> _Attend:
        return _Attend(self.dropout, self.scores.options(self.scaling), causal, window)

    def by_sdpa(self, mask: Tensor, packed: rows.Packed | None) -> Tensor:
        """Attention by transformers' `sdpa` with a mask of all pairs; packed rows are masked from one another."""
        query, key, value = self.heads
        self.scores.refuse_for_sdpa()
        if packed is not None:
            mask = rows.mask_other_rows(mask, packed, query, key)
        if mask.is_floating_point() and mask.dtype != query.dtype:  # The minimum of a wider dtype would become -inf.
            mask = mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        arguments: dict[str, Any] = {"dropout": self.dropout, "scaling": self.scaling, "is_causal": False}
        out: Tensor = sdpa_attention_forward(self.module, query, key, value, mask, **arguments, **self.options)[0]
        return out

    def without_mask(self, packed: rows.Packed | None, is_causal: bool | None, sliding_window: int | None) -> Tensor:
        """Attention without a mask argument, masked only by the layer's own `is_causal` and window.

        Cross attention is causal only if the call says so: neither by default, nor by the layer's attribute if the
        numbers of keys and queries differ.
        """
        traced = torch.compiler.is_compiling()
        layer_causal = getattr(self.module, "is_causal", traced)  # The default of `sdpa` for a mask that it skipped.
        causal = bool(layer_causal) if is_causal is None else is_causal
        square = self.queries == self.keys
        if packed is None and causal and not square and self.queries > 1:
            if is_causal is None and not traced:
                causal = False
            elif self.queries > self.keys or traced:
                raise ValueError(
                    f"attn_implementation={NAME!r}: causal attention without a mask must have as many keys as queries, "
                    f"found {self.queries} queries over {self.keys} keys"
                )
            else:  # As in `sdpa`: keys after the queries are slots of a cache that are not filled yet.
                query, key, value = self.heads
                self.heads = query, key[:, :, : self.queries], value[:, :, : self.queries]
        if packed is None and self.queries == 1:
            causal = causal and sliding_window is not None
        if packed is None and square:
            packed = rows.without_mask(self.options.get("position_ids"), causal, *self.heads[:2])
        window = OPEN
        if sliding_window is not None and sliding_window < self.keys:
            # Layers hand over how many keys a window has on one side, the query's own included.
            window = (sliding_window - 1, -1 if causal else sliding_window - 1)
            if not causal and not square:
                raise ValueError(
                    f"attn_implementation={NAME!r}: a window on both sides must have as many keys as queries, "
                    f"found {self.queries} queries over {self.keys} keys"
                )
        if self.scores.has_other_bias:
            warn_once(f"attn_implementation={NAME!r}: transformers' sdpa serves position biases not by distance")
            query, key, _ = self.heads
            visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            visible = visible.tril(key.shape[2] - query.shape[2]) if causal else visible
            if window != OPEN:
                raise ValueError(f"attn_implementation={NAME!r} does not support this position_bias under a window")
            return self.by_sdpa(visible.expand(query.shape[0], 1, -1, -1), packed)
        q, k, v = (x.transpose(1, 2) for x in self.heads)
        return self._attend(causal, window).rows(q, k, v, *(packed or rows.one_row_each(q, k)))


class _Scores:
    """Softcap, sinks and position bias of a call, as transformers hands them over."""

    def __init__(self, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
        self.softcap = options.pop("softcap", None)
        sinks = [options.pop(name, None) for name in ("s_aux", "sinks")]
        self.sinks: Tensor | None = next((x for x in sinks if x is not None), None)
        self.given: Tensor | None = options.get("position_bias")
        if self.given is not None and not torch.compiler.is_compiling() and not bool(self.given.any()):
            self.given = None  # T5's cross attention, whose queries and keys are no distance apart
            del options["position_bias"]
        self.bias = None if self.given is None else _table(self.given, query.shape[2], key.shape[2])
        self.has_other_bias = self.given is not None and self.bias is None
        self.dtype = accumulation_dtype(query.dtype)

    def options(self, scale: float | None) -> dict[str, Any]:
        """The ops' arguments."""
        found: dict[str, Any] = {"scale": scale}
        if self.softcap is not None:
            found["softcap"] = self.softcap
        for name, x in (("sinks", self.sinks), ("position_bias", self.bias)):
            if x is not None:
                found[name] = x.to(self.dtype)
        return found

    def refuse_for_sdpa(self) -> None:
        """Refuse what transformers' `sdpa` cannot do, under a mask that the ops cannot serve."""
        for name, x in (("softcap", self.softcap), ("s_aux", self.sinks)):
            if x is not None:
                raise ValueError(
                    f"attn_implementation={NAME!r} does not support {name} under a mask [B, 1, Lq, Lk]; use 'eager'"
                )


def _table(bias: Tensor, queries: int, keys: int) -> Tensor | None:
    """The table `[H, 2 P + 1]` by distance of a position bias `[1, H, Lq, Lk]`; None where there is more to it.

    Its entries are those of the first query and of the first key, so that gradients reach what the bias was made of.
    """
    if torch.compiler.is_compiling() or bias.shape[0] != 1 or bias.shape[2:] != (queries, keys) or not bias.numel():
        return None
    if not bool((bias[..., 1:, 1:] == bias[..., :-1, :-1]).all()):
        return None
    first_query, first_key = bias[0, :, 0].flip(1), bias[0, :, 1:, 0]
    return F.pad(torch.cat((first_query, first_key), 1), (max(keys - queries, 0), max(queries - keys, 0)))


class _Attend:
    """Attention of one call by the ops: its scores' options and its masks."""

    def __init__(self, dropout: float, scores: dict[str, Any], causal: bool, window: tuple[int, int]) -> None:
        self.dropout, self.scores = dropout, scores
        self.causal, self.window = causal, window

    def _options(self, q: Tensor) -> dict[str, Any]:
        return {**self.scores, **shared.dropout_options(self.dropout, q.device)}

    def packed(self, q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor) -> Tensor:
        """`q [Tq, H, D]` over `k`, `v [Tk, Hk, ...]`."""
        masks: dict[str, Any] = {"kv_offsets": kv_offsets, "causal": self.causal, "window": self.window}
        return shared.output_only(jagged_attention(q, k, v, q_offsets, **masks, **self._options(q)))

    def rows(self, q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor) -> Tensor:
        """A batch without padding, `q [B, Lq, H, D]`, with rows given by offsets: `[B, Lq, H, Dv]`."""
        flat = self.packed(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), q_offsets, kv_offsets)
        return flat.view(*q.shape[:2], *flat.shape[1:])

    def padded(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        """A batch whose keys are tokens where `tokens [B, Lk]` is True: `[B, Lq, H, Dv]`.

        Causal queries are the last `Lq` of these tokens, and their outputs are zero at padding. Other queries may come
        from another sequence, and all of them get outputs.
        """
        keys = layout_of_mask(tokens)
        k, v = keys.pack(k), keys.pack(v)
        if self.causal or self.window != OPEN or "position_bias" in self.scores:
            queries = layout_of_mask(tokens[:, tokens.shape[1] - q.shape[1] :])
            return queries.pad(self.packed(queries.pack(q), k, v, queries.offsets, keys.offsets))
        return shared.output_only(gated_cross_attention(q, k, v, keys.offsets, **self._options(q)))
