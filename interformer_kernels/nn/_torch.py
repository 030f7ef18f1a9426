"""Adapters of PyTorch's own modules: `MultiheadAttention`, `TransformerEncoderLayer`, `TransformerEncoder`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interformer_kernels.jagged import layout_of_mask
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn._calls import (
    count_by_children,
    count_served,
    count_unserved,
    unserved_counts,
    unsupported_transform,
)
from interformer_kernels.nn._mask_forms import BandMask, Form, additive_of, form_of, with_padding
from interformer_kernels.nn._torch_attend import attend
from interformer_kernels.nn.accelerate import register_adapter
from interformer_kernels.ops.jagged_attention import jagged_attention

# ---------------------------------------------------------------- masks

_PATH = "PyTorch's own path"


def read_padding_mask(mask: Tensor) -> Tensor | None:
    """A key padding mask as bool, True at padding; None if it is additive with numbers other than 0 and -inf."""
    if mask.dtype == torch.bool:
        return mask
    padding = mask == -torch.inf
    return padding if bool((padding | (mask == 0)).all()) else None


# ---------------------------------------------------------------- the modules


class FastMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose attention is computed by the ops, over the keys that are not padding."""

    serves = "calls with need_weights=False, with masks that are causality, a window or padding"

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
        """As `nn.MultiheadAttention`; calls that the ops cannot serve take its original path, with one warning."""
        form = self._form_of_call(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        if isinstance(form, str):
            count_unserved(self, "MultiheadAttention", _PATH, form)
            masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
            weights: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
            return super().forward(query, key, value, is_causal=is_causal, **masks, **weights)
        count_served(self)
        if not self.batch_first:
            # A tensor that is passed twice is transposed once, so that it is recognised and projected once.
            same_query_key, same_key_value = query is key, key is value
            query = query.transpose(0, 1)
            key = query if same_query_key else key.transpose(0, 1)
            value = key if same_key_value else value.transpose(0, 1)
        out = attend(self, query, key, value, form)
        return out if self.batch_first else out.transpose(0, 1), None

    def _form_of_call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Form:
        """The form of this call's masks, or the reason why the ops cannot serve the call."""
        batch = 0 if self.batch_first else 1
        if need_weights:
            return "need_weights=True (the default), because the ops do not return attention weights"
        if query.is_nested or key.is_nested or value.is_nested:
            return "nested tensors"
        if query.dim() != 3 or key.dim() != 3 or key.shape[:2] != value.shape[:2]:
            return "inputs that are not three tensors of three axes"
        if reason := unsupported_transform((key_padding_mask, attn_mask), (query, key, value, *self.parameters())):
            return reason
        rows, keys = key.shape[batch], key.shape[1 - batch]
        if query.shape[batch] != rows or (key_padding_mask is not None and key_padding_mask.shape != (rows, keys)):
            return "inputs of unequal batch sizes"
        if key_padding_mask is not None and torch.compiler.is_compiling():
            return "padding masks under torch.compile, where the number of tokens would depend on data"
        length = query.shape[1 - batch]
        if attn_mask is None:
            form: Form = "is_causal=True without an attn_mask" if is_causal else BandMask()
        elif is_causal and key_padding_mask is None:
            # PyTorch trusts the hint in these calls without looking at the mask.
            form = BandMask(upper=0) if length == keys else "is_causal=True with other numbers of queries and keys"
        else:
            form = self._form_of_mask(attn_mask, query, (rows, length, keys))
        if isinstance(form, str) or (attn_mask is None and key_padding_mask is None):
            return form
        padding = None if key_padding_mask is None else read_padding_mask(key_padding_mask)
        if padding is None and key_padding_mask is not None:
            return "an additive key_padding_mask with numbers other than 0 and -inf"
        return with_padding(form, padding, rows, length, query.device)

    def _form_of_mask(self, mask: Tensor, query: Tensor, sizes: tuple[int, int, int]) -> Form:
        """The form of an attention mask for `sizes` rows, queries and keys, or the reason why it has none."""
        rows, length, keys = sizes
        if torch.compiler.is_compiling():
            return "an attn_mask that cannot be read under torch.compile (without is_causal)"
        shapes = (length, keys), (rows * self.num_heads, length, keys)
        dense = mask.layout is torch.strided and not mask.is_nested and mask.device == query.device
        if mask.shape not in shapes or not dense or not (mask.dtype == torch.bool or mask.is_floating_point()):
            return "an attn_mask of another shape, layout, device or dtype"
        if mask.requires_grad:
            return "an attn_mask that requires a gradient"
        return form_of(mask, rows, self.num_heads)


class FastTransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` that calls its attention at inference too, instead of its fused path."""

    serves = "the calls that its attention serves"

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As `nn.TransformerEncoderLayer`."""
        if src.is_nested:
            count_unserved(self, "TransformerEncoderLayer", _PATH, "nested tensors")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks, before = (src_mask, src_key_padding_mask, is_causal), unserved_counts((self.self_attn,))
        attn_out = self._sa_block(self.norm1(src) if self.norm_first else src, *masks)
        count_by_children(self, (self.self_attn,), before)
        if self.norm_first:
            x = src + attn_out
            return x + self._ff_block(self.norm2(x))
        return self._after_attention(src, attn_out)

    def forward_packed(self, x: Tensor, offsets: Tensor) -> Tensor:
        """The layer (post-norm) for packed tokens `[T, E]`."""
        for module in (self, self.self_attn):
            count_served(module)
        drops = shared.dropout_of(self.self_attn, x.device)
        attn_out = shared.output_only(jagged_attention(*shared.project_self(self.self_attn, x), offsets, **drops))
        return self._after_attention(x, self.dropout1(shared.project_out(self.self_attn, attn_out)))

    def _after_attention(self, x: Tensor, attn_out: Tensor) -> Tensor:
        x = self.norm1(x + attn_out)
        out: Tensor = self.norm2(x + self._ff_block(x))
        return out


class FastTransformerEncoder(nn.TransformerEncoder):
    """`nn.TransformerEncoder` that packs a padded batch once, before its layers."""

    serves = "the calls that its layers serve; padded batches without other masks are packed once for all layers"

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As `nn.TransformerEncoder`; at padding, the output is that of zero inputs, as in PyTorch's inference path."""
        mask, src_key_padding_mask = self._additive(src, mask, src_key_padding_mask)
        padding = None
        if mask is None and src_key_padding_mask is not None and self._packs(src, src_key_padding_mask):
            padding = read_padding_mask(src_key_padding_mask)
        if padding is None:  # The layers decide by themselves, and warn.
            before = unserved_counts(self.layers)
            unpacked_out: Tensor = super().forward(src, mask, src_key_padding_mask, is_causal)
            count_by_children(self, self.layers, before)
            return unpacked_out
        count_served(self)
        layout = layout_of_mask(~padding)
        x = layout.pack(src)
        for layer in self.layers:
            assert isinstance(layer, FastTransformerEncoderLayer)
            x = layer.forward_packed(x, layout.offsets)
        out = layout.pad(x)
        return out if self.norm is None else self.norm(out)

    def _additive(
        self, src: Tensor, mask: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The masks as PyTorch's encoder adds them, which makes a bool one anew at every call.

        The same tensor at every call lets its layers recognise it once. Padding follows, as its dtype must agree.
        """
        if (
            mask is None
            or mask.dtype != torch.bool
            or torch.compiler.is_compiling()
            or mask.layout is not torch.strided
        ):
            return mask, padding
        if padding is not None:
            if padding.dtype != torch.bool:
                return mask, padding
            padding = torch.zeros_like(padding, dtype=src.dtype).masked_fill_(padding, -torch.inf)
        return additive_of(mask, src.dtype), padding

    def _packs(self, src: Tensor, padding: Tensor) -> bool:
        """Whether the layers can take this call packed; `forward_packed` runs no hooks."""
        if torch.compiler.is_compiling() or src.is_nested or src.dim() != 3 or padding.shape != src.shape[:2]:
            return False
        if unsupported_transform((padding,), (src, *self.parameters())):
            return False
        for module in self.layers.modules():
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


# ---------------------------------------------------------------- adapters


def unsupported_reason(attention: nn.Module) -> str:
    """The reason why this attention module cannot be swapped; empty if it can."""
    if not isinstance(attention, nn.MultiheadAttention):
        return f"its attention is a {type(attention).__name__}"
    if type(attention) not in (nn.MultiheadAttention, FastMultiheadAttention):
        return f"its attention is a {type(attention).__name__}, a subclass whose forward may differ"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "add_bias_kv or add_zero_attn, which the ops do not support"
    return ""


def _adapt_attention(module: nn.Module) -> type[nn.Module] | str:
    return unsupported_reason(module) or FastMultiheadAttention


def _adapt_layer(module: nn.Module) -> type[nn.Module] | str:
    assert isinstance(module, nn.TransformerEncoderLayer)
    return unsupported_reason(module.self_attn) or FastTransformerEncoderLayer


def _adapt_encoder(module: nn.Module) -> type[nn.Module] | str:
    assert isinstance(module, nn.TransformerEncoder)
    if not module.use_nested_tensor:
        return "enable_nested_tensor is off or unavailable, so its outputs at padding matter; its layers are swapped"
    for layer in module.layers:
        is_known = type(layer) in (nn.TransformerEncoderLayer, FastTransformerEncoderLayer)
        if not is_known or unsupported_reason(layer.self_attn):
            return "one of its layers cannot be swapped"
    return FastTransformerEncoder


register_adapter(nn.MultiheadAttention, _adapt_attention)
register_adapter(nn.TransformerEncoderLayer, _adapt_layer)
register_adapter(nn.TransformerEncoder, _adapt_encoder)
