"""Self attention of rows of unequal length, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interformer_kernels import _checks as checks
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn._rows import read_rows
from interformer_kernels.ops.jagged_attention import jagged_attention


class JaggedSelfAttention(shared.AttentionModule):
    r"""Multi-head self attention inside each row of a packed or padded batch.

    .. math:: y = W_O\, \mathrm{concat}_h\, \mathrm{softmax}\!\left(\frac{q_h k_h^\top}{\sqrt{D}}\right) v_h + b_O,
              \qquad (q, k, v) = W_{in} x + b_{in}

    where tokens see only their own row, restricted by ``causal``, ``window`` and ``num_prefix``. Without padding this
    is ``torch.nn.MultiheadAttention`` of ``(x, x, x)``, with the same parameter names, shapes and initialisation. At
    padding the output is zero, unlike PyTorch's.

    Args:
        embed_dim: ``E``, the width of input and output.
        num_heads: ``H``, a divisor of ``E``; heads have ``D = E / H`` channels.
        dropout: the probability with which an attention weight is dropped in training; the others grow by
            ``1 / (1 - dropout)``. The seed comes from torch's generator of the device.
        bias: whether the four projections have biases.
        batch_first: padded batches are ``[B, L, E]``; else ``[L, B, E]``, PyTorch's default.
        device, dtype: device and dtype of the parameters.
        causal: a token sees no later token.
        window: ``(left, right)``: the number of tokens before and after it that a token sees; -1 means no bound.
        num_prefix: the first ``num_prefix`` tokens of a row (CLS tokens) see the whole row and are visible to all of
            it, whatever the other masks.
        rope_interleaved: rotary channel pairs are ``(2c, 2c+1)`` instead of ``(c, c + R/2)``.
        backend: backend of the op; None chooses the fastest that can serve.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or ``embed_dim`` is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        causal: bool = False,
        window: tuple[int, int] = (-1, -1),
        num_prefix: int = 0,
        rope_interleaved: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, None, None, batch_first, backend, device, dtype)
        name = "JaggedSelfAttention"
        self.masks: dict[str, Any] = {
            "causal": checks.check_bool(name, "causal", causal),
            "window": checks.check_window(name, window),
            "num_prefix": checks.check_count(name, "num_prefix", num_prefix),
        }
        self.rope_interleaved = checks.check_bool(name, "rope_interleaved", rope_interleaved)

    def forward(
        self,
        x: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query: Tensor | None = None,
        offsets: Tensor | None = None,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention inside each row.

        Args:
            x: packed ``[T, E]`` with ``offsets``, or padded ``[B, L, E]`` (``[L, B, E]`` without ``batch_first``).
            key, value: None, or ``x`` itself, as in self attention by PyTorch's module.
            need_weights, attn_mask, average_attn_weights, is_causal: arguments of PyTorch's call: no weights are
                returned, and the masks are those of the constructor (``is_causal`` may be True if ``causal`` is).
            query: PyTorch's name for ``x``.
            offsets: ``[B+1]`` int32 or int64: row ``b`` is ``x[offsets[b]:offsets[b+1]]``. Tokens from ``offsets[B]``
                on are not read and come out zero.
            key_padding_mask: ``[B, L]`` bool, or integers 0 and 1: True marks **padding**.
            key_mask: ``[B, L]``, likewise: True marks a **token**. Padding may be anywhere.
            lengths: ``[B]`` int32 or int64: the number of tokens of each row; padding follows them.
            rope: tables ``(cos, sin)``, each ``[P, R/2]`` float32, ``R <= D``: queries and keys are rotated by the
                index of their token in its row, padding not counted.

        Returns:
            A tensor of the shape of ``x``, zero at padding, where PyTorch's module returns a pair.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, shape or value, or two of ``offsets``,
                ``key_padding_mask``, ``key_mask`` and ``lengths`` are given.
        """
        name = type(self).__name__
        if (x is None) == (query is None):
            found = "neither" if x is None else "both"
            raise TypeError(f"{name}: exactly one of x and query (PyTorch's name for x) must be given; found {found}")
        x = query if x is None else x
        for argument, tensor in (("key", key), ("value", value)):
            if tensor is not None and tensor is not x:
                expected = f"{argument} must be x itself (GatedCrossAttention has separate keys and values)"
                raise ValueError(f"{name}: {expected}; found {checks.describe(tensor)}")
        shared.check_call(name, need_weights, attn_mask, is_causal, self.masks["causal"])
        mask: dict[str, Any] = {"key_padding_mask": key_padding_mask, "key_mask": key_mask, "lengths": lengths}
        rows = read_rows(name, "x", x, self.embed_dim, offsets=offsets, batch_first=self.batch_first, **mask)
        q, k, v = shared.project_self(self, rows.tokens)
        options: dict[str, Any] = {**self.masks, "rope": rope, "rope_interleaved": self.rope_interleaved}
        options.update(shared.dropout_options(self.training * self.dropout, q.device), backend=self.backend)
        attn_out = shared.output_only(jagged_attention(q, k, v, rows.offsets, **options))
        return rows.restore(self.out_proj(attn_out.flatten(-2)))

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options: Any) -> JaggedSelfAttention:
        """The same attention, sharing the parameters of ``module`` (they are not copied).

        Args:
            module: a ``torch.nn.MultiheadAttention`` without ``add_bias_kv``, ``add_zero_attn``, ``kdim``, ``vdim``.
            options: further arguments of the constructor (``causal=True``).

        Raises:
            TypeError: ``module`` is not such a module.
            ValueError: the module has an option without counterpart here.
        """
        shared.check_convertible(cls.__name__, module)
        if module.in_proj_weight is None:
            expected = f"kdim and vdim of embed_dim = {module.embed_dim}"
            raise ValueError(
                f"{cls.__name__}.from_torch: module must have {expected}, found {module.kdim}, {module.vdim}"
            )
        return shared.adopt(cls(**shared.torch_arguments(module), **options), module)

    def to_torch(self) -> nn.MultiheadAttention:
        """A ``torch.nn.MultiheadAttention`` that shares the parameters of this module; it takes masks in its call."""
        return shared.as_torch(self)
