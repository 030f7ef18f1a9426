"""Pooling by multi-head attention of learned queries, as a module; with folded projections, or as Set Transformer's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interformer_kernels import _checks as checks
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn._rows import read_rows
from interformer_kernels.ops.pma_folded import folding_wins, merge_rows, pool_folded, split_rows
from interformer_kernels.ops.pma_pooling import pma_pooling


def pool_rows(
    attention: shared.Attention,
    query: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    fold: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of projected queries `[M, H, D]` over each row of `x [T, width]`, before `out_proj`: `[B, M, H, D]`.

    With `fold=None`, `folding_wins` decides.
    """
    scale = attention.head_dim**-0.5 if scale is None else scale
    if fold is None:
        fold = folding_wins(query.shape[0] * query.shape[1], attention.embed_dim)
    if fold:
        (key_weight, _), value_parameters = (shared.weight_and_bias(attention, index) for index in (1, 2))
        return pool_folded(query, key_weight, *value_parameters, x, offsets, scale=scale, backend=backend)
    k, v = shared.project_keys(attention, x, x)
    return shared.output_only(pma_pooling(query, k, v, offsets, scale=scale, backend=backend))


class PMAPooling(shared.AttentionModule):
    r"""Each row pooled by ``M`` learned queries that all rows share, with key and value projections.

    .. math:: y = W_O A + b_O, \qquad
              A = \mathrm{concat}_h\, \mathrm{softmax}(scale \cdot q_h k_h^\top)\, v_h, \qquad
              q = W_Q s + b_Q, \; k = W_K x + b_K, \; v = W_V x + b_V

    with ``scale = 1/sqrt(D)``. It equals ``torch.nn.MultiheadAttention`` of ``(seeds, x, x)``, and has its parameter
    names, shapes and initialisation. A row without tokens has ``A = 0``.

    **Folded projections.** The key projection can be folded into the queries, and the value projection applied to the
    pooled tokens, so that they cost once per row instead of once per token. Results agree within rounding. ``M * H``
    compared with ``E`` decides which form is cheaper (``fold``).

    **Set Transformer's form** (``set_transformer=True``; the PMA of Lee et al., 2019, as in the authors' code, without
    the feed-forward before it): ``scale = 1/sqrt(E)``, the projected queries as residual, and

    .. math:: h = \mathrm{norm}(q + A), \qquad y = \mathrm{norm}(h + \mathrm{relu}(W_O h + b_O))

    Args:
        embed_dim: ``E``, the width of seeds and output.
        num_heads: ``H``, a divisor of ``E``; heads have ``D = E / H`` channels.
        num_seeds: ``M``.
        dropout: the probability with which an attention weight is dropped in training; the others grow by
            ``1 / (1 - dropout)``. The seed comes from torch's generator of the device.
        bias: whether the projections have biases.
        kdim: width of ``x``; None means ``E``.
        batch_first: padded batches are ``[B, L, E]`` and their outputs ``[B, M, E]``; else the batch axis is second.
        device, dtype: device and dtype of the parameters.
        set_transformer: use Set Transformer's form.
        layer_norm: use its two norms; else ``norm`` is the identity. Ignored without ``set_transformer``.
        fold: True, False, or None for the cost rule (docs/measured-facts.md has its figures).
        backend: backend of the op; None chooses the fastest that can serve.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or ``embed_dim`` is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_seeds: int = 1,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        set_transformer: bool = False,
        layer_norm: bool = True,
        fold: bool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, dropout, bias, kdim, kdim, batch_first, backend, device, dtype)
        embed_dim, num_seeds = self.embed_dim, checks.check_count("PMAPooling", "num_seeds", num_seeds, least=1)
        self.num_seeds, self.set_transformer, self.fold = num_seeds, set_transformer, fold
        self.scale = (embed_dim if set_transformer else self.head_dim) ** -0.5
        self.seeds = nn.Parameter(torch.empty(num_seeds, embed_dim, device=device, dtype=dtype))
        nn.init.xavier_uniform_(self.seeds)
        normed = set_transformer and layer_norm
        norms = [nn.LayerNorm(embed_dim, device=device, dtype=dtype) if normed else None for _ in range(2)]
        self.attention_norm, self.out_norm = norms

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        super().reset_parameters()
        nn.init.xavier_uniform_(self.seeds)
        for norm in (self.attention_norm, self.out_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        offsets: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Pool every row.

        Args:
            x: packed ``[T, kdim]`` with ``offsets``, or padded ``[B, L, kdim]`` (``[L, B, kdim]`` without
                ``batch_first``).
            offsets: ``[B+1]`` int32 or int64: row ``b`` is ``x[offsets[b]:offsets[b+1]]``; tokens from ``offsets[B]``
                on are not read.
            key_padding_mask: ``[B, L]`` bool, or integers 0 and 1: True marks **padding**.
            key_mask: ``[B, L]``, likewise: True marks a **token**. Padding may be anywhere.
            lengths: ``[B]`` int32 or int64: the number of tokens of each row; padding follows them.

        Returns:
            ``[B, M, E]``; ``[M, B, E]`` for a padded batch without ``batch_first``.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, shape or value, or two of ``offsets``,
                ``key_padding_mask``, ``key_mask`` and ``lengths`` are given.
        """
        mask: dict[str, Any] = {"key_padding_mask": key_padding_mask, "key_mask": key_mask, "lengths": lengths}
        rows = read_rows(type(self).__name__, "x", x, self.kdim, offsets=offsets, batch_first=self.batch_first, **mask)
        query = shared.project_query(self, self.seeds)
        drops = shared.dropout_options(self.training * self.dropout, query.device)
        if drops:
            k, v = shared.project_keys(self, rows.tokens, rows.tokens)
            drops.update(scale=self.scale, backend=self.backend)
            pooled = shared.output_only(pma_pooling(query, k, v, rows.offsets, **drops))
        else:
            options: dict[str, Any] = {"scale": self.scale, "fold": self.fold, "backend": self.backend}
            pooled = pool_rows(self, query, rows.tokens, rows.offsets, **options)
        if self.set_transformer:
            hidden = merge_rows((query + pooled).flatten(-2))
            hidden = hidden if self.attention_norm is None else self.attention_norm(hidden)
            out = hidden + F.relu(self.out_proj(hidden))
            out = out if self.out_norm is None else self.out_norm(out)
        else:
            out = self.out_proj(merge_rows(pooled.flatten(-2)))
        return rows.restore_rows(split_rows(out, pooled.shape[:2]))

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, seeds: Tensor, **options: Any) -> PMAPooling:
        """Pooling that computes ``module(seeds, x, x)`` for every row, and shares the module's parameters.

        Args:
            module: a ``torch.nn.MultiheadAttention`` without ``add_bias_kv`` and ``add_zero_attn``, its ``kdim`` equal
                to its ``vdim``.
            seeds: ``[M, E]``; a ``Parameter`` is shared, another tensor is copied.
            options: further arguments of the constructor except ``set_transformer``, which PyTorch's module lacks.

        Raises:
            TypeError: ``module`` is not such a module, or ``seeds`` is not a tensor.
            ValueError: the module has an option without counterpart here, or the seeds have another shape.
        """
        name = f"{cls.__name__}.from_torch"
        shared.check_convertible(cls.__name__, module)
        if module.kdim != module.vdim:
            raise ValueError(f"{name}: module must have kdim equal to vdim, found {module.kdim} and {module.vdim}")
        if options.get("set_transformer"):
            raise ValueError(f"{name}: set_transformer must be False, because module lacks that form; found True")
        if not isinstance(seeds, Tensor):
            raise TypeError(f"{name}: seeds must be a tensor [M, E], found {checks.describe(seeds)}")
        checks.Axes(name, E=module.embed_dim).bind("seeds", seeds, ("M", "E"))
        pooling = cls(**shared.torch_arguments(module), num_seeds=seeds.shape[0], kdim=module.kdim, **options)
        pooling.seeds = seeds if isinstance(seeds, nn.Parameter) else nn.Parameter(seeds.detach().clone())
        return shared.adopt(pooling, module)

    def to_torch(self) -> tuple[nn.MultiheadAttention, nn.Parameter]:
        """``(module, seeds)`` that share the parameters of this module: ``module(seeds, x, x)`` computes the same.

        Raises:
            ValueError: this is Set Transformer's form, which ``torch.nn.MultiheadAttention`` lacks.
        """
        if self.set_transformer:
            expected = "set_transformer must be False, because torch.nn.MultiheadAttention lacks that form"
            raise ValueError(f"{type(self).__name__}.to_torch: {expected}; found True")
        return shared.as_torch(self), self.seeds
