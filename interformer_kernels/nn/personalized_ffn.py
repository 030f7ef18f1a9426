"""Personalised feed-forward as a module: a linear layer whose weights are generated from a context of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interformer_kernels import _checks as checks
from interformer_kernels.nn._rows import read_rows
from interformer_kernels.ops.personalized_ffn import personalized_ffn


class PersonalizedFFN(nn.Module):
    r"""A linear layer for each row of a packed or padded batch; its weights are a linear function of the row's context.

    .. math:: y_t = act(x_t W_b + \beta_b) \;(+\; x_t), \qquad W_b = \mathrm{reshape}(P c_b + p), \;
              \beta_b = R c_b + r, \qquad b = \text{row of token } t

    At initialisation the rows' layers are nearly equal: the contexts' part of the weights is smaller by ``sqrt(E)``.

    Args:
        embed_dim: ``E``, the width of the tokens.
        context_dim: ``C``, the width of a row's context (a user's features, a summary of the row).
        out_dim: ``F``, the output's width; None means ``E``.
        bias: whether rows have biases ``beta_b``.
        batch_first: padded batches are ``[B, L, E]``; else ``[L, B, E]``.
        device, dtype: device and dtype of the parameters.
        activation: ``"identity"``, ``"relu"``, ``"silu"`` or ``"gelu"`` (by erf).
        residual: add the tokens to the result (needs ``F == E``).
        backend: backend of the op; None chooses the fastest that can serve.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or there is a residual and ``F`` is not ``E``.
    """

    def __init__(
        self,
        embed_dim: int,
        context_dim: int,
        out_dim: int | None = None,
        bias: bool = True,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "identity",
        residual: bool = False,
        backend: str | None = None,
    ) -> None:
        name = type(self).__name__
        out_dim = embed_dim if out_dim is None else out_dim
        sizes = {"embed_dim": embed_dim, "context_dim": context_dim, "out_dim": out_dim}
        embed_dim, context_dim, out_dim = (checks.check_count(name, *size, least=1) for size in sizes.items())
        checks.check_choice(name, "activation", activation, checks.FFN_ACTIVATIONS)
        checks.backend_name(name, backend)
        if residual and out_dim != embed_dim:
            raise ValueError(f"{name}: out_dim must be embed_dim = {embed_dim} with a residual, found {out_dim}")
        super().__init__()
        self.embed_dim, self.context_dim, self.out_dim, self.batch_first = embed_dim, context_dim, out_dim, batch_first
        self.activation, self.residual, self.backend = activation, residual, backend
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_proj = nn.Linear(context_dim, embed_dim * out_dim, **factory_kwargs)
        self.bias_proj = nn.Linear(context_dim, out_dim, **factory_kwargs) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        self.weight_proj.reset_parameters()
        self.weight_proj.weight /= self.embed_dim**0.5
        nn.init.uniform_(self.weight_proj.bias, -(self.embed_dim**-0.5), self.embed_dim**-0.5)
        if self.bias_proj is not None:
            self.bias_proj.reset_parameters()

    def row_weights(self, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layers for contexts ``[B, C]``: weights ``[B, E, F]`` and biases ``[B, F]``."""
        weight = self.weight_proj(context).unflatten(-1, (self.embed_dim, self.out_dim))
        return weight, None if self.bias_proj is None else self.bias_proj(context)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        offsets: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer of its row to every token.

        Args:
            x: packed ``[T, E]`` with ``offsets``, or padded ``[B, L, E]`` (``[L, B, E]`` without ``batch_first``).
            context: ``[B, C]``.
            offsets: ``[B+1]`` int32 or int64: row ``b`` is ``x[offsets[b]:offsets[b+1]]``. Tokens from ``offsets[B]``
                on are not read and come out zero.
            key_padding_mask: ``[B, L]`` bool, or integers 0 and 1: True marks **padding**.
            key_mask: ``[B, L]``, likewise: True marks a **token**. Padding may be anywhere.
            lengths: ``[B]`` int32 or int64: the number of tokens of each row; padding follows them.

        Returns:
            A tensor in the form of ``x``, of width ``F``; zero at padding.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, shape or value, or two of ``offsets``,
                ``key_padding_mask``, ``key_mask`` and ``lengths`` are given.
        """
        name = type(self).__name__
        mask: dict[str, Any] = {"key_padding_mask": key_padding_mask, "key_mask": key_mask, "lengths": lengths}
        rows = read_rows(name, "x", x, self.embed_dim, offsets=offsets, batch_first=self.batch_first, **mask)
        if not isinstance(context, Tensor):
            raise TypeError(f"{name}: context must be a tensor [B, C], found {checks.describe(context)}")
        checks.Axes(name, B=rows.offsets.shape[0] - 1, C=self.context_dim).bind("context", context, ("B", "C"))
        weight, bias = self.row_weights(context)
        options: dict[str, Any] = {"activation": self.activation, "backend": self.backend}
        residual = rows.tokens if self.residual else None
        return rows.restore(
            personalized_ffn(rows.tokens, weight, rows.offsets, bias=bias, residual=residual, **options)
        )

    @classmethod
    def from_torch(cls, module: nn.Linear, context_dim: int, **options: Any) -> PersonalizedFFN:
        """A module that computes ``module`` for every row: its weights are copied, the contexts' weights are zero.

        Args:
            module: a ``torch.nn.Linear``.
            context_dim: ``C``.
            options: further arguments of the constructor (``batch_first=True``).

        Raises:
            TypeError: ``module`` is not a ``torch.nn.Linear``.
        """
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"{cls.__name__}.from_torch: module must be a torch.nn.Linear, found {type(module).__name__}"
            )
        bias, weight = module.bias, module.weight
        like: dict[str, Any] = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
        converted = cls(module.in_features, context_dim, module.out_features, **like, **options)
        with torch.no_grad():
            converted.weight_proj.weight.zero_()
            converted.weight_proj.bias.copy_(weight.T.flatten())
            if converted.bias_proj is not None:
                converted.bias_proj.weight.zero_()
                converted.bias_proj.bias.copy_(bias)
        return converted.train(module.training)

    def to_torch(self, context: Tensor) -> nn.Linear:
        """A copy of the linear layer for a context ``[C]``, without activation and residual.

        Raises:
            ValueError: the context has another shape, or the module has an activation or a residual, which a
                ``torch.nn.Linear`` lacks.
        """
        name = f"{type(self).__name__}.to_torch"
        if self.activation != "identity" or self.residual:
            expected = "activation must be 'identity' and residual False, because torch.nn.Linear has neither"
            raise ValueError(f"{name}: {expected}; found {self.activation!r} and {self.residual}")
        checks.Axes(name, C=self.context_dim).bind("context", context, ("C",))
        with torch.no_grad():
            weights, biases = self.row_weights(context[None])
        linear = nn.Linear(self.embed_dim, self.out_dim, bias=biases is not None, device="meta")
        linear.weight = nn.Parameter(weights[0].T.contiguous())
        if biases is not None:
            linear.bias = nn.Parameter(biases[0].clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """The sizes shown by the module's `repr`."""
        return f"embed_dim={self.embed_dim}, context_dim={self.context_dim}, out_dim={self.out_dim}"
