"""Gated cross attention, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interformer_kernels import _checks as checks
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn._rows import Rows, read_rows
from interformer_kernels.ops.gated_cross_attention import gated_cross_attention


class GatedCrossAttention(shared.AttentionModule):
    r"""Multi-head attention of each row's queries over all keys of the row, with heads gated by the query.

    .. math:: y = W_O\, G(A, W_G x + b_G) + b_O, \qquad
              A = \mathrm{concat}_h\, \mathrm{softmax}\!\left(\frac{q_h k_h^\top}{\sqrt{D}}\right) v_h

    with ``q`` from the query ``x``, ``k`` from the key, ``v`` from the value, and ``G(A, g) = A * act(g)`` or
    ``act(A * g)``. Without a gate this is ``torch.nn.MultiheadAttention``, with the same parameter names, shapes and
    initialisation. A row without keys has ``A = 0``.

    Args:
        embed_dim: ``E``, the width of queries and output.
        num_heads: ``H``, a divisor of ``E``; heads have ``D = E / H`` channels.
        dropout: the probability with which an attention weight is dropped in training; the others grow by
            ``1 / (1 - dropout)``. The seed comes from torch's generator of the device.
        bias: whether the projections have biases.
        kdim, vdim: widths of keys and values; None means ``E``.
        batch_first: padded batches are ``[B, L, E]``; else ``[L, B, E]``, PyTorch's default.
        device, dtype: device and dtype of the parameters.
        gate_activation: ``"sigmoid"``, ``"tanh"``, ``"silu"``, ``"identity"``; None means no gate.
        gate_form: ``"multiply"``: ``A * act(g)``; ``"self"``: ``act(A * g)``.
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
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gate_activation: str | None = "sigmoid",
        gate_form: str = "multiply",
        backend: str | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, backend, device, dtype)
        if gate_activation is not None:
            checks.check_choice("GatedCrossAttention", "gate_activation", gate_activation, checks.GATE_ACTIVATIONS)
        checks.check_choice("GatedCrossAttention", "gate_form", gate_form, checks.GATE_FORMS)
        self.gate_activation, self.gate_form = gate_activation, gate_form
        gated = gate_activation is not None
        self.gate_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype) if gated else None

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        super().reset_parameters()
        if self.gate_proj is not None:
            self.gate_proj.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        q_offsets: Tensor | None = None,
        kv_offsets: Tensor | None = None,
        kv_rows: Tensor | None = None,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Attention of the queries over the keys of their row.

        Args:
            query: dense ``[B, N, E]`` (``[N, B, E]`` without ``batch_first``), or packed ``[Tq, E]`` with
                ``q_offsets``.
            key: packed ``[Tk, kdim]`` with ``kv_offsets``, or padded ``[B, L, kdim]`` (``[L, B, kdim]``).
            value: in the form of ``key``, of width ``vdim``; None means ``key``.
            need_weights, attn_mask, average_attn_weights, is_causal: arguments of PyTorch's call, which must have
                these defaults: no weights are returned, and all keys of a row are visible.
            q_offsets, kv_offsets: ``[B+1]`` int32 or int64. Tokens from ``[B]`` on are not read and come out zero.
            kv_rows: ``[B]`` int32 or int64: the row of keys that each row of queries reads; keys may then have more or
                fewer rows, in any of their forms. None: the row of the same number.
            key_padding_mask: ``[B, L]`` bool, or integers 0 and 1: True marks **padding**.
            key_mask: ``[B, L]``, likewise: True marks a **token**. Padding may be anywhere.
            lengths: ``[B]`` int32 or int64: the number of tokens of each row; padding follows them.

        Returns:
            A tensor of the shape of ``query``, where PyTorch's module returns a pair.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, shape or value, or two of ``kv_offsets``,
                ``key_padding_mask``, ``key_mask`` and ``lengths`` are given.
        """
        name, batch_first = type(self).__name__, self.batch_first
        shared.check_call(name, need_weights, attn_mask, is_causal, False)
        key_options: dict[str, Any] = {
            "offsets": kv_offsets,
            "offsets_name": "kv_offsets",
            "key_padding_mask": key_padding_mask,
            "key_mask": key_mask,
            "lengths": lengths,
        }
        query_options: dict[str, Any] = {
            "offsets": q_offsets,
            "offsets_name": "q_offsets",
            "key_padding_mask": None,
            "key_mask": None,
        }
        keys = read_rows(name, "key", key, self.kdim, batch_first=batch_first, **key_options)
        queries = read_rows(name, "query", query, self.embed_dim, batch_first=batch_first, **query_options)
        q_rows, k_rows = queries.offsets.shape[0] - 1, keys.offsets.shape[0] - 1
        if kv_rows is None and q_rows != k_rows:
            raise ValueError(f"{name}: query must have the key's {k_rows} rows, found {q_rows}")
        values = keys.tokens if value is None else self._values(value, key, keys)
        k, v = shared.project_keys(self, keys.tokens, values)
        return queries.restore(self.out_proj(self._attend(queries, k, v, keys.offsets, kv_rows).flatten(-2)))

    def _values(self, value: Tensor, key: Tensor, keys: Rows) -> Tensor:
        axes = checks.Axes(type(self).__name__, E=self.vdim)
        names = ("T", "E") if keys.dense is None else ("B", "L", "E")
        axes.sizes.update(zip(names[:-1], key.shape[:-1], strict=True))
        axes.bind("value", value, names)
        return keys.like(value)

    def _attend(self, queries: Rows, k: Tensor, v: Tensor, kv_offsets: Tensor, kv_rows: Tensor | None) -> Tensor:
        """Gated attention output `[Tq, H, D]` of the queries."""
        q = shared.project_query(self, queries.tokens)
        gate = None if self.gate_proj is None else shared.split_heads(self, self.gate_proj(queries.tokens))
        activation = self.gate_activation or "identity"
        options: dict[str, Any] = {"gate_form": self.gate_form, "gate_activation": activation, "backend": self.backend}
        options.update(shared.dropout_of(self, q.device), q_offsets=queries.offsets, kv_rows=kv_rows)
        return shared.output_only(gated_cross_attention(q, k, v, kv_offsets, gate=gate, **options))

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options: Any) -> GatedCrossAttention:
        """The same attention, without a gate, sharing the parameters of ``module`` (they are not copied).

        Args:
            module: a ``torch.nn.MultiheadAttention`` without ``add_bias_kv`` and ``add_zero_attn``.
            options: further arguments of the constructor; ``gate_activation="sigmoid"`` adds a gate with newly
                initialised parameters.

        Raises:
            TypeError: ``module`` is not such a module.
            ValueError: the module has an option without counterpart here.
        """
        shared.check_convertible(cls.__name__, module)
        widths = {"kdim": module.kdim, "vdim": module.vdim, "gate_activation": None}
        converted = cls(**{**shared.torch_arguments(module), **widths, **options})
        if converted.gate_proj is not None:
            weight = module.out_proj.weight
            converted.gate_proj.to_empty(device=weight.device).to(weight.dtype).reset_parameters()
        return shared.adopt(converted, module)

    def to_torch(self) -> nn.MultiheadAttention:
        """A ``torch.nn.MultiheadAttention`` that shares the parameters of this module.

        Raises:
            ValueError: the module has a gate, which PyTorch's module lacks.
        """
        if self.gate_proj is not None:
            expected = "gate_activation must be None, because torch.nn.MultiheadAttention has no gate"
            raise ValueError(f"{type(self).__name__}.to_torch: {expected}; found {self.gate_activation!r}")
        return shared.as_torch(self)
