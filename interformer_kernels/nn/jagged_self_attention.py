"""Self attention of rows of unequal length, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interformer_kernels import _checks as checks
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn._rows import rows_of
from interformer_kernels.ops.apply_rotary import apply_rotary
from interformer_kernels.ops.jagged_attention import jagged_attention


class JaggedSelfAttention(shared.AttentionModule):
    r"""Multi-head self attention inside each row of a packed or padded batch.

    .. math:: y = W_O\, \mathrm{concat}_h\, \mathrm{softmax}\!\left(\frac{q_h k_h^\top}{\sqrt{D}}\right) v_h + b_O,
              \qquad (q, k, v) = W_{in} x + b_{in}

    where tokens see their own row only, and of it what ``causal``, ``window`` and ``num_prefix`` leave. Without padding
    this is ``torch.nn.MultiheadAttention`` of ``(x, x, x)``, whose parameter names, shapes and start it has. At
    padding, where PyTorch computes something, the output is zero.

    Args:
        embed_dim: ``E``, the width of input and output.
        num_heads: ``H``, a divisor of ``E``; heads have ``D = E / H`` channels.
        dropout: of the attention weights. The ops have none: above 0, the reference (eager PyTorch) computes the
            attention in training, and says so once in the log.
        bias: of all four projections.
        batch_first: padded batches are ``[B, L, E]``; without, ``[L, B, E]``, which is PyTorch's default.
        device, dtype: of the parameters.
        causal: a token sees no later token.
        window: ``(left, right)``: a token sees so many tokens before and after it; -1 is no bound.
        num_prefix: the first ``n`` tokens of a row (CLS tokens) see all of it and are seen by all, whatever the masks.
        rope_interleaved: rotary channel pairs are ``(2c, 2c+1)`` instead of ``(c, c + R/2)``.
        backend: of the op; None takes the fastest that can serve.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or ``embed_dim`` is no multiple of ``num_heads``.
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
            key, value: None, or ``x`` itself, as PyTorch's module is called for self attention.
            need_weights, attn_mask, average_attn_weights, is_causal: arguments of PyTorch's call, for callers that pass
                them: no weights are returned, and masks are the constructor's (``is_causal`` where it said ``causal``).
            query: PyTorch's name of ``x``.
            offsets: ``[B+1]`` int32 or int64: row ``b`` is ``x[offsets[b]:offsets[b+1]]``. Tokens from ``offsets[B]``
                on are not read and come out zero.
            key_padding_mask: ``[B, L]`` bool, or integers 0 and 1: True marks **padding**.
            key_mask: ``[B, L]``, likewise: True marks a **token**. Padding may stand anywhere.
            lengths: ``[B]`` int32 or int64: how many tokens each row has; padding stands behind them.
            rope: tables ``(cos, sin)``, each ``[P, R/2]`` float32, ``R <= D``: queries and keys are rotated by the
                index of their token in its row, padding not counted.

        Returns:
            The shape of ``x``; zero at padding. It comes alone, where PyTorch's module returns a pair.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, shape or value, or two of ``offsets``,
                ``key_padding_mask``, ``key_mask`` and ``lengths`` are given.
        """
        name = type(self).__name__
        if (x is None) == (query is None):
            found = "neither" if x is None else "both"
            raise TypeError(f"{name}: exactly one of x and query, its name in PyTorch, must be given; found {found}")
        x = query if x is None else x
        for argument, given in (("key", key), ("value", value)):
            if given is not None and given is not x:
                wanted = f"{argument} must be x itself, for self attention (GatedCrossAttention attends to others)"
                raise ValueError(f"{name}: {wanted}; found {checks.describe(given)}")
        shared.check_call(name, need_weights, attn_mask, is_causal, self.masks["causal"])
        mask: dict[str, Any] = {"key_padding_mask": key_padding_mask, "key_mask": key_mask, "lengths": lengths}
        rows = rows_of(name, "x", x, self.embed_dim, offsets=offsets, batch_first=self.batch_first, **mask)
        q, k, v = shared.project_self(self, rows.tokens)
        where = rows.offsets
        if shared.drops(self, self.dropout):
            if rope is not None:
                q, k = (apply_rotary(side, where, rope, interleaved=self.rope_interleaved) for side in (q, k))
            attn_out = shared.attend_dropping(q, k, v, where, where, self.dropout, **self.masks)
        else:
            rotary: dict[str, Any] = {"rope": rope, "rope_interleaved": self.rope_interleaved}
            attn_out = shared.alone(jagged_attention(q, k, v, where, **self.masks, **rotary, backend=self.backend))
        return rows.restore(self.out_proj(attn_out.flatten(-2)))

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options: Any) -> JaggedSelfAttention:
        """The same attention with the very parameters of ``module``, which are shared, not copied.

        Args:
            module: a ``torch.nn.MultiheadAttention`` without ``add_bias_kv``, ``add_zero_attn``, ``kdim``, ``vdim``.
            options: further arguments of the constructor (``causal=True``).

        Raises:
            TypeError: not such a module. ValueError: it has what has no counterpart here.
        """
        shared.check_torch(cls.__name__, module)
        if module.in_proj_weight is None:
            wanted = f"kdim and vdim of embed_dim = {module.embed_dim}"
            raise ValueError(
                f"{cls.__name__}.from_torch: module must have {wanted}, found {module.kdim}, {module.vdim}"
            )
        return shared.adopt(cls(**shared.torch_arguments(module), **options), module)

    def to_torch(self) -> nn.MultiheadAttention:
        """A ``torch.nn.MultiheadAttention`` with the very parameters of this module; masks are its call's arguments."""
        return shared.as_torch(self)
