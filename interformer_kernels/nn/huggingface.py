"""Attention of Hugging Face transformers by the ops: `register()`, then `attn_implementation="interformer"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from interformer_kernels.jagged import layout_of_tokens
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn._notices import say_once
from interformer_kernels.nn._rows import equal_offsets
from interformer_kernels.ops.gated_cross_attention import gated_cross_attention
from interformer_kernels.ops.jagged_attention import jagged_attention

NAME = "interformer"
_UNSERVED = ("softcap", "s_aux", "position_bias", "block_table")


def register() -> None:
    """Make ``attn_implementation="interformer"`` known to transformers (as often as you like).

    After it, models are loaded with it (``from_pretrained(..., attn_implementation="interformer")``) or switched to it
    (``model.set_attn_implementation("interformer")``). Served are

    - padded batches (``attention_mask [B, L]``, padding left, right or with holes), causal and bidirectional, with and
      without a dynamic cache: padding is left out. Where attention is causal, outputs at padding are zero;
    - packed batches (``position_ids`` that start anew, or ``cu_seq_lens_q`` and ``cu_seq_lens_k``, as FlashAttention
      takes them): rows do not see one another, and no mask of all pairs is looked at;
    - grouped heads, without repeating keys.

    Dropout in training takes the reference (eager PyTorch). Masks of another form (sliding windows shorter than the
    sequence, chunks, blocks, static caches, masks ``[B, 1, Lq, Lk]`` of your own), and padding under ``torch.compile``,
    take transformers' own ``sdpa`` path. Both say so once in the log. ``softcap``, attention sinks and position biases
    are refused with a ``ValueError``.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


# ---------------------------------------------------------------- the mask, made once for all layers


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """What the layers need to know of who sees whom; the number of axes says whether attention is causal.

    - None: nothing is hidden but what the layer's own `is_causal` hides.
    - `[B, Lk]`: attention is causal; bool, True at tokens, or int64, the row of each packed token.
    - `[B, 1, 1, Lk]`: likewise, and it is not causal.
    - bool `[B, 1, Lq, Lk]`: anything else, for `sdpa`.
    """
    compiling = torch.compiler.is_compiling()
    causal, packed, why = _pattern(mask_function, kv_length + kv_offset, compiling)
    if not why and causal and (isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length):
        why = "a static cache, whose keys go on behind the queries"
    if not why and attention_mask is not None and compiling:
        why = "padding under torch.compile, where the number of tokens would be data"
    if why:
        say_once(f"attn_implementation={NAME!r}: transformers' sdpa serves {why}")
        sizes: dict[str, Any] = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        offsets: dict[str, Any] = {"q_offset": q_offset, "kv_offset": kv_offset}
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        given: dict[str, Any] = {"mask_function": mask_function, "attention_mask": attention_mask}
        pairs: Tensor | None = masking_utils.sdpa_mask(**{**options, **sizes, **offsets, **given, **skips})
        return pairs
    told = packed
    if told is None and attention_mask is not None:
        held = F.pad(attention_mask.bool(), (0, max(kv_offset + kv_length - attention_mask.shape[1], 0)))
        held = held[:, kv_offset : kv_offset + kv_length]
        told = None if bool(held.all()) else held
    return told if told is None or causal else told[:, None, None]


def _pattern(function: Callable[..., Any], length: int, compiling: bool) -> tuple[bool, Tensor | None, str]:
    """Whether the mask function is causal, the rows `[B, L]` of packed tokens, and why it is of another form (or "").

    Mask functions are closures, which say what they hide only pair by pair; so transformers' own are known by the
    function that made them, and all others are of another form.
    """
    if function is masking_utils.causal_mask_function:
        return True, None, ""
    if function is masking_utils.bidirectional_mask_function:
        return False, None, ""
    parts: Any = () if compiling else _closure(function, masking_utils.and_masks).get("mask_functions", ())
    if len(parts) == 2:
        overlay = _closure(parts[0], masking_utils.sliding_window_overlay)
        if overlay and overlay["sliding_window"] >= length:
            return _pattern(parts[1], length, compiling)
        remapped = _closure(parts[0], masking_utils.remap_positions_for_packed_sequence)
        rows = _closure(parts[1], masking_utils.packed_sequence_mask_function)
        if remapped and rows:
            causal, packed, why = _pattern(remapped["mask_function"], length, compiling)
            return causal, rows["packed_sequence_mask"], why or ("rows within rows" if packed is not None else "")
    return False, None, "a mask of another form than causal, bidirectional, padded or packed"


def _closure(function: Callable[..., Any], maker: Callable[..., Any]) -> dict[str, Any]:
    """What a function that `maker` made holds, by name; empty for a function that it did not make."""
    if not function.__qualname__.startswith(f"{maker.__qualname__}.<locals>.") or not function.__closure__:
        return {}
    if function.__module__ != maker.__module__:
        return {}
    return {n: cell.cell_contents for n, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True)}


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

    Raises:
        ValueError: an option that the ops have not.
    """
    for name in _UNSERVED:
        if options.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} does not support {name}; take 'eager' or another")
    if attention_mask is not None and not _known(attention_mask):
        say_once(f"attn_implementation={NAME!r}: transformers' sdpa serves masks [B, 1, Lq, Lk]")
        masked: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **masked, **options)[0]
        return out, None
    if attention_mask is not None and attention_mask.dim() == 4:  # It says all: neither causal nor a window.
        attention_mask = attention_mask[:, 0, 0].expand(query.shape[0], -1)
        causal, sliding_window = False, None
    elif attention_mask is not None:
        causal = True
    else:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if sliding_window is not None and not causal:
        raise ValueError(f"attn_implementation={NAME!r} does not support bidirectional sliding windows; take 'sdpa'")
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, -1)
    attend = _Attend(scaling, causal, window, dropout)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is None or attention_mask.dtype != torch.bool:
        return attend.rows(q, k, v, *_offsets(q, k, attention_mask, cu_seq_lens_q, cu_seq_lens_k)), None
    return attend.padded(q, k, v, attention_mask), None


def _known(mask: Tensor) -> bool:
    """Whether a mask is one of ours that need no pairs."""
    if mask.dtype not in (torch.bool, torch.int64):
        return False
    return mask.dim() == 2 or (mask.shape[1:3] == (1, 1) and not torch.compiler.is_compiling())


def _offsets(
    q: Tensor, k: Tensor, rows: Tensor | None, cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Offsets of queries and keys of a flat batch `[B, L, ...]`: as they are told, or one row for each of the batch."""
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        return cu_seq_lens_q, cu_seq_lens_k
    if rows is not None:
        first = torch.ones_like(rows[:, :1], dtype=torch.bool)
        starts = torch.cat((first, rows.diff(dim=1) != 0), 1).flatten().nonzero().squeeze(1)
        offsets = torch.cat((starts, starts.new_tensor([rows.numel()])))
        return offsets, offsets
    return equal_offsets(q.shape[0], q.shape[1], q.device), equal_offsets(k.shape[0], k.shape[1], k.device)


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
