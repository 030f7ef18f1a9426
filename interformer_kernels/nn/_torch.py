"""Adapters of PyTorch's own modules: `MultiheadAttention`, `TransformerEncoderLayer`, `TransformerEncoder`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interformer_kernels.jagged import layout_of_tokens
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn._calls import count_as, count_served, count_unserved, transformed, unserved_of
from interformer_kernels.nn._rows import equal_offsets
from interformer_kernels.nn.accelerate import register_adapter
from interformer_kernels.ops.gated_cross_attention import gated_cross_attention
from interformer_kernels.ops.jagged_attention import jagged_attention

# ---------------------------------------------------------------- masks


def as_padding(mask: Tensor) -> Tensor | None:
    """A key padding mask as bool, True at padding; None for an additive one with numbers other than 0 and -inf."""
    if mask.dtype == torch.bool:
        return mask
    padding = mask == -torch.inf
    return padding if bool((padding | (mask == 0)).all()) else None


def has_holes(padding: Tensor) -> bool:
    """Whether padding stands between two tokens of some row."""
    token = ~padding
    starts = token[:, :1].sum(1) + (token[:, 1:] & padding[:, :-1]).sum(1)
    return bool((starts > 1).any())


def is_causal_mask(mask: Tensor, length: int) -> bool:
    """Whether an attention mask, bool or additive, hides just the later keys of `length` tokens."""
    if mask.shape != (length, length):
        return False
    later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    hidden = mask if mask.dtype == torch.bool else mask == -torch.inf
    return bool((hidden == later).all()) and (mask.dtype == torch.bool or bool((mask.where(~later, 0) == 0).all()))


# ---------------------------------------------------------------- attention of padded batches


def attend_padded(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, causal: bool
) -> Tensor:
    """What `MultiheadAttention` computes for `query [B, N, E]` over `key`, `value [B, L, ...]`: `[B, N, E]`.

    `padding [B, L]` marks keys that nobody sees; it is without holes where the attention is causal. Queries at padding
    are answered, too, as PyTorch does.
    """
    if padding is not None and bool(padding.any()):
        attend = _attend_causal if causal else _attend_packed_keys
        return shared.project_out(attention, attend(attention, query, key, value, padding))
    rows, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    flat = key.flatten(0, 1)
    if query is key and key is value:
        q, k, v = shared.project_self(attention, flat)
    else:
        q = shared.project_query(attention, query.flatten(0, 1))
        k, v = shared.project_keys(attention, flat, flat if value is key else value.flatten(0, 1))
    own, other = equal_offsets(rows, queries, query.device), equal_offsets(rows, keys, query.device)
    attn_out = shared.alone(jagged_attention(q, k, v, own, kv_offsets=other, causal=causal))
    return shared.project_out(attention, attn_out).view(rows, queries, attention.embed_dim)


def _attend_packed_keys(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor
) -> Tensor:
    """All queries `[B, N, E]` over the keys that are not padding: `[B, N, H, D]`."""
    layout = layout_of_tokens(~padding)
    packed = layout.pack(key)
    k, v = shared.project_keys(attention, packed, packed if value is key else layout.pack(value))
    return shared.alone(gated_cross_attention(shared.project_query(attention, query), k, v, layout.offsets))


def _attend_causal(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor
) -> Tensor:
    """Causal attention of as many queries as keys: `[B, L, H, D]`.

    Tokens see tokens up to themselves. Queries at padding see what stands before them: all tokens where the padding is
    on the right, none, and so nothing, where it is on the left.
    """
    tokens = layout_of_tokens(~padding)
    after = layout_of_tokens(padding & ((~padding).cumsum(1) > 0))
    packed = tokens.pack(key)
    k, v = shared.project_keys(attention, packed, packed if value is key else tokens.pack(value))
    q = shared.project_query(attention, query)
    seen = jagged_attention(tokens.pack(q), k, v, tokens.offsets, causal=True)
    rest = gated_cross_attention(after.pack(q), k, v, tokens.offsets, q_offsets=after.offsets)
    return tokens.pad(shared.alone(seen)) + after.pad(shared.alone(rest))


# ---------------------------------------------------------------- the modules


class FastMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose attention the ops compute, over the keys that are not padding."""

    serves = "calls with need_weights=False, with padding or causal masks, in training without dropout"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`; calls that the ops cannot serve take its own path, and say so once."""
        why = self._why_not(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        padding = None
        if not why and key_padding_mask is not None:
            padding = as_padding(key_padding_mask)
            if padding is None:
                why = "an additive key_padding_mask with numbers other than 0 and -inf"
            elif attn_mask is not None and has_holes(padding):
                why = "a causal mask beside padding with holes"
        if why:
            count_unserved(self, "MultiheadAttention", f"PyTorch's own path for {why}")
            masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
            weights: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
            return super().forward(query, key, value, is_causal=is_causal, **masks, **weights)
        count_served(self)
        if not self.batch_first:
            # One tensor stays one: it is projected once.
            one, same = query is key, key is value
            query = query.transpose(0, 1)
            key = query if one else key.transpose(0, 1)
            value = key if same else value.transpose(0, 1)
        out = attend_padded(self, query, key, value, padding, attn_mask is not None)
        return out if self.batch_first else out.transpose(0, 1), None

    def _why_not(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> str:
        """Why the ops cannot serve this call, as far as it shows without the padding's contents; empty if they can."""
        batch = 0 if self.batch_first else 1
        compiling = torch.compiler.is_compiling()
        if need_weights:
            return "need_weights=True (its default): weights were asked for, which the ops do not return"
        if self.training and self.dropout:
            return f"dropout = {self.dropout} in training, for the ops drop no attention weights"
        if query.is_nested or key.is_nested or value.is_nested:
            return "nested tensors"
        if query.dim() != 3 or key.dim() != 3 or key.shape[:2] != value.shape[:2]:
            return "inputs that are not three tensors of three axes"
        if why := transformed((key_padding_mask, attn_mask), (query, key, value, *self.parameters())):
            return why
        rows, keys = key.shape[batch], key.shape[1 - batch]
        if query.shape[batch] != rows or (key_padding_mask is not None and key_padding_mask.shape != (rows, keys)):
            return "inputs of unequal batch sizes"
        if key_padding_mask is not None and compiling:
            return "padding masks under torch.compile, where the number of tokens would be data"
        if attn_mask is None:
            return "is_causal=True without an attn_mask" if is_causal else ""
        length = query.shape[1 - batch]
        # As PyTorch does, the hint is trusted where it alone decides.
        trusted = is_causal and key_padding_mask is None and length == keys
        if not trusted and (compiling or length != keys or not is_causal_mask(attn_mask, keys)):
            return "an attn_mask that is not the causal one (or cannot be told under torch.compile without is_causal)"
        return ""


class FastTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` that calls its attention at inference, too, instead of its fused path."""

    serves = "what its attention serves"

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As `nn.TransformerEncoderLayer`."""
        if src.is_nested:
            count_unserved(self, "TransformerEncoderLayer", "PyTorch's own path for nested tensors")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks, before = (src_mask, src_key_padding_mask, is_causal), unserved_of((self.self_attn,))
        attn_out = self._sa_block(self.norm1(src) if self.norm_first else src, *masks)
        count_as(self, (self.self_attn,), before)
        if self.norm_first:
            x = src + attn_out
            return x + self._ff_block(self.norm2(x))
        return self._behind_attention(src, attn_out)

    def forward_packed(self, x: Tensor, offsets: Tensor) -> Tensor:
        """The layer for packed tokens `[T, E]`, normed after each block."""
        for module in (self, self.self_attn):
            count_served(module)
        attn_out = shared.alone(jagged_attention(*shared.project_self(self.self_attn, x), offsets))
        return self._behind_attention(x, self.dropout1(shared.project_out(self.self_attn, attn_out)))

    def _behind_attention(self, x: Tensor, attn_out: Tensor) -> Tensor:
        x = self.norm1(x + attn_out)
        out: Tensor = self.norm2(x + self._ff_block(x))
        return out


class FastTransformerEncoder(nn.TransformerEncoder):
    """`nn.TransformerEncoder` that packs a padded batch once, before its layers."""

    serves = "what its layers serve; padded batches without other masks are packed once for all of them"

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As `nn.TransformerEncoder`; at padding, the output is that of zeros, as it is at PyTorch's inference."""
        padding = None
        if mask is None and src_key_padding_mask is not None and self._packs(src, src_key_padding_mask):
            padding = as_padding(src_key_padding_mask)
        if padding is None:  # The layers, served or not, say what there is to say.
            before = unserved_of(self.layers)
            found: Tensor = super().forward(src, mask, src_key_padding_mask, is_causal)
            count_as(self, self.layers, before)
            return found
        count_served(self)
        layout = layout_of_tokens(~padding)
        x = layout.pack(src)
        for layer in self.layers:
            assert isinstance(layer, FastTransformerEncoderLayer)
            x = layer.forward_packed(x, layout.offsets)
        out = layout.pad(x)
        return out if self.norm is None else self.norm(out)

    def _packs(self, src: Tensor, padding: Tensor) -> bool:
        """Whether this call can go packed through layers that are not called as modules."""
        if torch.compiler.is_compiling() or src.is_nested or src.dim() != 3 or padding.shape != src.shape[:2]:
            return False
        if transformed((padding,), (src, *self.parameters())):
            return False
        for module in self.layers.modules():
            if isinstance(module, nn.MultiheadAttention) and module.training and module.dropout:
                return False
            if any(
                (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
            ):
                return False
        return all(
            isinstance(layer, FastTransformerEncoderLayer)
            and type(layer.self_attn) is FastMultiheadAttention
            and not layer.norm_first
            for layer in self.layers
        )


# ---------------------------------------------------------------- which modules they serve


def why_left(attention: nn.Module) -> str:
    """Why this attention cannot be served; empty where it can."""
    if not isinstance(attention, nn.MultiheadAttention):
        return f"its attention is a {type(attention).__name__}"
    if type(attention) not in (nn.MultiheadAttention, FastMultiheadAttention):
        return f"its attention is a {type(attention).__name__}, a subclass whose forward may differ"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "add_bias_kv or add_zero_attn, which the ops have not"
    return ""


def _attention(module: nn.Module) -> type[nn.Module] | str:
    return why_left(module) or FastMultiheadAttention


def _layer(module: nn.Module) -> type[nn.Module] | str:
    assert isinstance(module, nn.TransformerEncoderLayer)
    return why_left(module.self_attn) or FastTransformerEncoderLayer


def _encoder(module: nn.Module) -> type[nn.Module] | str:
    assert isinstance(module, nn.TransformerEncoder)
    if not module.use_nested_tensor:
        return "enable_nested_tensor is off or cannot be had, so its outputs at padding matter; its layers are swapped"
    for layer in module.layers:
        if type(layer) not in (nn.TransformerEncoderLayer, FastTransformerEncoderLayer) or why_left(layer.self_attn):
            return "a layer of it cannot be swapped"
    return FastTransformerEncoder


register_adapter(nn.MultiheadAttention, _attention)
register_adapter(nn.TransformerEncoderLayer, _layer)
register_adapter(nn.TransformerEncoder, _encoder)
