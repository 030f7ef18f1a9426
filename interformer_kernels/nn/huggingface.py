"""Attention of Hugging Face transformers by the ops: `register()`, then `attn_implementation="interformer"`."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from interformer_kernels.jagged import layout_of_tokens
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn import _huggingface_rows as rows
from interformer_kernels.nn._huggingface_mask import NAME, Form, PairMask, Pairs, mask, with_rows
from interformer_kernels.nn._notices import say_once
from interformer_kernels.nn._rows import equal_offsets
from interformer_kernels.ops.gated_cross_attention import gated_cross_attention
from interformer_kernels.ops.jagged_attention import jagged_attention

# Options of a call that change what attention computes, and that the ops have not.
_UNSERVED: tuple[str, ...] = ("softcap", "s_aux", "sinks", "position_bias", "attention_bias", "alibi", "head_mask")
_UNSERVED += ("indices", "block_indices", "block_table")


def register() -> None:
    """Make ``attn_implementation="interformer"`` known to transformers (as often as you like).

    After it, models are loaded with it (``from_pretrained(..., attn_implementation="interformer")``) or switched to it
    (``model.set_attn_implementation("interformer")``). Served are

    - padded batches (``attention_mask [B, L]``, padding left, right or with holes), causal and bidirectional, with and
      without a dynamic cache: padding is left out. Where attention is causal, outputs at padding are zero;
    - packed batches: ``cu_seq_lens_q`` and ``cu_seq_lens_k``, as FlashAttention takes them, or, in causal models and
      without an ``attention_mask``, ``position_ids`` that start anew. Rows do not see one another, with a cache and
      without, and no mask of all pairs is looked at. (Of bidirectional models, whose masks know no positions, rows are
      told by ``cu_seq_lens`` alone.);
    - grouped heads, without repeating keys.

    Dropout in training takes the reference (eager PyTorch). Masks of another form (sliding windows shorter than the
    sequence, chunks, blocks, static caches, masks ``[B, 1, Lq, Lk]`` of your own), and padding under ``torch.compile``,
    take transformers' own ``sdpa`` path, within packed rows where these are told. Both say so once in the log.

    A ``ValueError`` says what can be had in no way: classes that attend by their own code (when they are loaded);
    ``softcap``, attention sinks, position biases and chosen keys (``indices``); packed rows that a mask of another form
    would not let stand alone, or that a model does not hand to its attention; ``position_ids`` that start anew beside
    an ``attention_mask``, in bidirectional attention or behind a filled cache. What a layer does with its mask itself
    sees the numbers of transformers' ``eager``.

    Transformers has no place for two of these questions; so its ``get_correct_attn_implementation`` asks, for this name
    alone, whether a class can be served, and ``_preprocess_mask_arguments`` looks for packed rows beside a cache.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    check = getattr(PreTrainedModel, "get_correct_attn_implementation", None)
    if check is not None and not hasattr(check, "_asks_interformer"):
        PreTrainedModel.get_correct_attn_implementation = _asking(check)  # type: ignore[method-assign]
    preprocess = getattr(masking_utils, "_preprocess_mask_arguments", None)
    if preprocess is not None and not hasattr(preprocess, "_finds_rows"):
        masking_utils._preprocess_mask_arguments = with_rows(preprocess)


def _asking(check: Any) -> Any:
    """Transformers' check of a model's class against a name, which has no place for what other names need."""

    @functools.wraps(check)
    def get_correct_attn_implementation(self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
        if requested_attention == NAME and (kind := _attends_itself(self.__class__)) is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} cannot serve {type(self).__name__}: {kind.__module__} attends by code "
                "of its own, not transformers' AttentionInterface; take 'eager', or name the parts to be served, as in "
                f"attn_implementation={{'text_config': {NAME!r}}}"
            )
        if requested_attention == NAME:
            rows.follow(self)
        return check(self, requested_attention, *args, **kwargs)

    get_correct_attn_implementation._asks_interformer = True  # type: ignore[attr-defined]
    return get_correct_attn_implementation


@functools.cache
def _attends_itself(model: type) -> type | None:
    """The class, of a model's and its parents, in whose file attention does not go through the interface.

    As `PreTrainedModel._can_set_attn_implementation` finds it, but a file that cannot be read is no reason to refuse.
    """
    for kind in model.__mro__[: model.__mro__.index(PreTrainedModel)]:
        try:
            code = inspect.getsource(sys.modules[kind.__module__])
        except (KeyError, OSError, TypeError):
            continue
        own = re.search(r"^class \w*Attention\w*\(nn\.Module\):", code, re.MULTILINE)
        if own and "ALL_ATTENTION_FUNCTIONS.get_interface(" not in code:
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
    """`query [B, H, Lq, D]` over `key [B, Hk, Lk, D]`, `value [B, Hk, Lk, Dv]`: `[B, Lq, H, Dv]`, as transformers asks.

    A mask says all: neither the layer's `is_causal` nor its window is looked at beside it.

    Raises:
        ValueError: an option that the ops have not, or packed rows that cannot be kept apart.
    """
    for name in _UNSERVED:
        if options.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} does not support {name}; take 'eager' or another")
    if options.get("output_attentions"):
        say_once(f"attn_implementation={NAME!r} returns no attention weights (output_attentions=True); take 'eager'")
    if query.shape[0] == 1:
        query = query.expand(key.shape[0], -1, -1, -1)
    packed = rows.told(query, key, cu_seq_lens_q, cu_seq_lens_k)
    call = _Call(module, query, key, value, dropout, scaling, options)
    if attention_mask is None:
        return call.without_mask(packed, is_causal, sliding_window), None
    if isinstance(attention_mask, PairMask):
        if attention_mask.shape[0] == query.shape[0] and attention_mask.shape[2:] == (query.shape[2], key.shape[2]):
            return call.by_pairs(attention_mask.pairs, packed), None
        attention_mask = attention_mask.pairs.added
    if attention_mask.dim() != 4 or not (attention_mask.is_floating_point() or attention_mask.dtype == torch.bool):
        found = f"{list(attention_mask.shape)} of {attention_mask.dtype}"
        raise ValueError(
            f"attn_implementation={NAME!r}: a mask must be [B, 1, Lq, Lk], bool or floating, found {found}"
        )
    traced = torch.compiler.is_compiling()
    if attention_mask.shape[1:3] == (1, 1) and attention_mask.dtype == torch.bool and packed is None and not traced:
        tokens = attention_mask[:, 0, 0].expand(query.shape[0], -1)
        return call.by_form(Form(False, tokens), None), None
    say_once(f"attn_implementation={NAME!r}: transformers' sdpa serves masks [B, 1, Lq, Lk]")
    return call.by_sdpa(attention_mask, packed), None


class _Call:
    """One call of :func:`attention`: what it is about, and the ways in which it can be served."""

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

    def by_pairs(self, pairs: Pairs, packed: rows.Packed | None) -> Tensor:
        """Under a mask that the layers were told by the mask function."""
        if packed is not None and self.queries != self.keys:
            raise ValueError(
                f"attn_implementation={NAME!r}: cu_seq_lens must go with as many keys as queries where there is a "
                f"mask, found {self.queries} queries over {self.keys} keys (a filled cache)"
            )
        query, key, _ = self.heads
        packed = rows.joined(pairs, packed, query)
        if packed is None and not pairs.told_apart:
            packed = rows.by_positions(pairs, self.options.get("position_ids"), query, key)
        if packed is not None and not (pairs.told_apart or pairs.shifts):
            raise ValueError(
                f"attn_implementation={NAME!r}: packed rows do not go with this mask, which is not the same for a row "
                "wherever it stands; pass position_ids that start anew and no attention_mask, or rows one by one"
            )
        form = None if pairs.read else pairs.form
        if form is not None and (packed is None or form.tokens is None):
            return self.by_form(form, packed)
        say_once(f"attn_implementation={NAME!r}: transformers' sdpa serves masks [B, 1, Lq, Lk]")
        return self.by_sdpa(pairs.added if pairs.read else pairs.seen(), packed)

    def by_form(self, form: Form, packed: rows.Packed | None) -> Tensor:
        """By the ops: packed rows, a padded batch, or one without padding."""
        attend = _Attend(self.scaling, form.causal, (-1, -1), self.dropout)
        q, k, v = (x.transpose(1, 2) for x in self.heads)
        if form.tokens is not None:
            return attend.padded(q, k, v, form.tokens)
        return attend.rows(q, k, v, *(packed or rows.one_each(q, k)))

    def by_sdpa(self, mask: Tensor, packed: rows.Packed | None) -> Tensor:
        """By transformers, with a mask of all pairs; packed rows are hidden from one another."""
        query, key, value = self.heads
        if packed is not None:
            mask = rows.hide_others(mask, packed, query, key)
        if mask.is_floating_point() and mask.dtype != query.dtype:  # The least number of one dtype is -inf in another.
            mask = mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        named: dict[str, Any] = {"dropout": self.dropout, "scaling": self.scaling, "is_causal": False}
        out: Tensor = sdpa_attention_forward(self.module, query, key, value, mask, **named, **self.options)[0]
        return out

    def without_mask(self, packed: rows.Packed | None, is_causal: bool | None, sliding_window: int | None) -> Tensor:
        """Where the layers were told nothing: nothing is hidden but what the layer's own `is_causal` hides.

        Cross attention is not causal unless the call says so: neither by default, nor by an attribute of the layer
        where keys and queries are not equally many.
        """
        traced = torch.compiler.is_compiling()
        own = getattr(self.module, "is_causal", traced)  # What `sdpa` takes where it left a mask out.
        causal = bool(own) if is_causal is None else is_causal
        square = self.queries == self.keys
        if packed is None and causal and not square and self.queries > 1:
            if is_causal is None and not traced:
                causal = False
            elif self.queries > self.keys or traced:
                raise ValueError(
                    f"attn_implementation={NAME!r}: causal attention without a mask must have as many keys as queries, "
                    f"found {self.queries} queries over {self.keys} keys"
                )
            else:  # As `sdpa` does: keys behind the queries are places of a cache that are not filled yet.
                query, key, value = self.heads
                self.heads = query, key[:, :, : self.queries], value[:, :, : self.queries]
        if packed is None and self.queries == 1:
            causal = causal and sliding_window is not None
        if packed is None and square:
            packed = rows.without_mask(self.options.get("position_ids"), causal, *self.heads[:2])
        if sliding_window is not None and not causal:
            if sliding_window < self.keys:
                raise ValueError(
                    f"attn_implementation={NAME!r} does not support bidirectional sliding windows; take 'sdpa'"
                )
            sliding_window = None
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, -1)
        attend = _Attend(self.scaling, causal, window, self.dropout)
        q, k, v = (x.transpose(1, 2) for x in self.heads)
        return attend.rows(q, k, v, *(packed or rows.one_each(q, k)))


class _Attend:
    """Attention of one call, by the op or, where weights are dropped, by the reference."""

    def __init__(self, scale: float | None, causal: bool, window: tuple[int, int], dropout: float) -> None:
        self.options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window}
        self.causal, self.dropout = causal, dropout
        if dropout:
            say_once(
                f"attn_implementation={NAME!r}: dropout = {dropout} in training: the reference computes the attention"
            )

    def packed(self, q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor) -> Tensor:
        """`q [Tq, H, D]` over `k`, `v [Tk, Hk, ...]`."""
        if self.dropout:
            return shared.attend_dropping(q, k, v, q_offsets, kv_offsets, self.dropout, **self.options)
        return shared.alone(jagged_attention(q, k, v, q_offsets, kv_offsets=kv_offsets, **self.options))

    def rows(self, q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, kv_offsets: Tensor) -> Tensor:
        """A batch without padding, `q [B, Lq, H, D]`, whose rows lie as the offsets say: `[B, Lq, H, Dv]`."""
        flat = self.packed(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), q_offsets, kv_offsets)
        return flat.view(*q.shape[:2], *flat.shape[1:])

    def padded(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        """A batch whose keys are tokens where `tokens [B, Lk]` is True: `[B, Lq, H, Dv]`.

        Causal queries are the last `Lq` of these tokens, and zero where they are padding; others may be of another
        sequence, and all of them are answered.
        """
        keys = layout_of_tokens(tokens)
        k, v = keys.pack(k), keys.pack(v)
        if self.causal:
            own = layout_of_tokens(tokens[:, tokens.shape[1] - q.shape[1] :])
            return own.pad(self.packed(own.pack(q), k, v, own.offsets, keys.offsets))
        if self.dropout:
            every = equal_offsets(q.shape[0], q.shape[1], q.device)
            flat = self.packed(q.flatten(0, 1), k, v, every, keys.offsets)
            return flat.view(*q.shape[:2], *flat.shape[1:])
        return shared.alone(gated_cross_attention(q, k, v, keys.offsets, scale=self.options["scale"]))
