"""Pooling by multi-head attention of learned queries, as a module: folded projections, and Set Transformer's form."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interformer_kernels import _checks as checks
from interformer_kernels.nn import _attention as shared
from interformer_kernels.nn._rows import equal_offsets, rows_of
from interformer_kernels.ops.pma_pooling import pma_pooling

# Folded projections win while the queries M * H are at most this share of E: measured, see docs/measured-facts.md.
FOLDED_SHARE = 0.25


def folding_wins(num_queries: int, embed_dim: int) -> bool:
    """The cost rule: whether pooling by `num_queries = M * H` is cheaper with folded projections.

    Unfolded, a token of width `W` costs `4 E W` operations of its projections and `4 M E` of attention; folded,
    `4 M H W` of attention over the token itself, and a row `2 M E W` of its values' projection. Long rows would allow a
    larger share; the rule knows the module's sizes alone, so that a row's bits do not depend on its batch.
    """
    return num_queries <= FOLDED_SHARE * embed_dim


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

    `fold` None leaves the choice to `folding_wins`.
    """
    scale = attention.head_dim**-0.5 if scale is None else scale
    if fold is None:
        fold = folding_wins(query.shape[0] * query.shape[1], attention.embed_dim)
    if fold:
        (key, _), value = (shared.weight_and_bias(attention, which) for which in (1, 2))
        return pool_folded(query, key, *value, x, offsets, scale=scale, backend=backend)
    k, v = shared.project_keys(attention, x, x)
    return shared.alone(pma_pooling(query, k, v, offsets, scale=scale, backend=backend))


def pool_folded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    x: Tensor,
    offsets: Tensor,
    *,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """`pool_rows` with the keys' projection folded into the queries, and the values' applied to the pooled raw tokens.

    `key`, `value` `[E, width]` and `bias [E]` are those of the projections. A key's bias adds the same to all scores of
    a query and cancels in the softmax; the value's bias is added once, to rows that are not empty.
    """
    heads = query.shape[1:]
    folded = torch.einsum("mhd,hdw->mhw", query, key.unflatten(0, heads))
    pooled = shared.alone(pma_pooling(folded, x[:, None], None, offsets, scale=scale, backend=backend))
    # As einsum("bmhw,hdw->bmhd"), but not asking whether B is 1: an exported program would serve many rows only. The
    # copy is the one that joining the heads would make.
    by_head = torch.bmm(
        shared.merge_rows(pooled).transpose(0, 1), value.unflatten(0, heads).transpose(1, 2)
    )  # [H, B*M, D]
    by_row = by_head.transpose(0, 1).clone(memory_format=torch.contiguous_format)
    projected = shared.split_rows(by_row, pooled.shape[:2])
    if bias is None:
        return projected
    filled = (offsets.diff() > 0)[:, None, None, None]
    return projected + bias.to(projected.dtype).view(heads).where(filled, 0)


class PMAPooling(shared.AttentionModule):
    r"""Each row pooled by ``M`` learned queries that all rows share, with key and value projections.

    .. math:: y = W_O A + b_O, \qquad
              A = \mathrm{concat}_h\, \mathrm{softmax}(scale \cdot q_h k_h^\top)\, v_h, \qquad
              q = W_Q s + b_Q, \; k = W_K x + b_K, \; v = W_V x + b_V

    with ``scale = 1/sqrt(D)``: this is ``torch.nn.MultiheadAttention`` of ``(seeds, x, x)``, whose parameter names,
    shapes and start it has. A row without tokens has ``A = 0``.

    **Folded projections.** The projections of keys and values need not be done for every token: folded into the
    queries and applied to the pooled tokens, they cost once for each row. The results agree within rounding; which is
    cheaper is a matter of ``M * H`` against ``E`` (``fold``).

    **Set Transformer's form** (``set_transformer=True``; Lee et al., 2019, its PMA as the authors' code has it, without
    the feed-forward before it): ``scale = 1/sqrt(E)``, the projected queries as residual, and

    .. math:: h = \mathrm{norm}(q + A), \qquad y = \mathrm{norm}(h + \mathrm{relu}(W_O h + b_O))

    Args:
        embed_dim: ``E``, the width of seeds and output.
        num_heads: ``H``, a divisor of ``E``; heads have ``D = E / H`` channels.
        num_seeds: ``M``.
        dropout: of the attention weights. The ops have none: above 0, the reference (eager PyTorch) computes the
            attention in training, and says so once in the log.
        bias: of all projections.
        kdim: width of ``x``; None is ``E``.
        batch_first: padded batches are ``[B, L, E]`` and outputs of theirs ``[B, M, E]``; without, the batch is second.
        device, dtype: of the parameters.
        set_transformer: Set Transformer's form.
        layer_norm: its two norms; without, ``norm`` is the identity. Has no meaning elsewhere.
        fold: True, False, or None for what the cost rule says (docs/measured-facts.md has its figures).
        backend: of the op; None takes the fastest that can serve.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or ``embed_dim`` is no multiple of ``num_heads``.
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
        """Draw all parameters anew."""
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
            key_mask: ``[B, L]``, likewise: True marks a **token**. Padding may stand anywhere.
            lengths: ``[B]`` int32 or int64: how many tokens each row has; padding stands behind them.

        Returns:
            ``[B, M, E]``; ``[M, B, E]`` for a padded batch without ``batch_first``.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind, shape or value, or two of ``offsets``,
                ``key_padding_mask``, ``key_mask`` and ``lengths`` are given.
        """
        mask: dict[str, Any] = {"key_padding_mask": key_padding_mask, "key_mask": key_mask, "lengths": lengths}
        rows = rows_of(type(self).__name__, "x", x, self.kdim, offsets=offsets, batch_first=self.batch_first, **mask)
        query = shared.project_query(self, self.seeds)
        if shared.drops(self, self.dropout):
            attn_out = self._pool_dropping(query, rows.tokens, rows.offsets)
        else:
            options: dict[str, Any] = {"scale": self.scale, "fold": self.fold, "backend": self.backend}
            attn_out = pool_rows(self, query, rows.tokens, rows.offsets, **options)
        if self.set_transformer:
            hidden = shared.merge_rows((query + attn_out).flatten(-2))
            hidden = hidden if self.attention_norm is None else self.attention_norm(hidden)
            out = hidden + F.relu(self.out_proj(hidden))
            out = out if self.out_norm is None else self.out_norm(out)
        else:
            out = self.out_proj(shared.merge_rows(attn_out.flatten(-2)))
        return rows.restore_rows(shared.split_rows(out, attn_out.shape[:2]))

    def _pool_dropping(self, query: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
        rows = offsets.shape[0] - 1
        k, v = shared.project_keys(self, x, x)
        q, own = query.expand(rows, *query.shape).flatten(0, 1), equal_offsets(rows, self.num_seeds, x.device)
        attn_out = shared.attend_dropping(q, k, v, own, offsets, self.dropout, scale=self.scale)
        return attn_out.view(rows, self.num_seeds, *attn_out.shape[1:])

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, seeds: Tensor, **options: Any) -> PMAPooling:
        """Pooling as ``module(seeds, x, x)`` does it for every row, with its very parameters (shared, not copied).

        Args:
            module: a ``torch.nn.MultiheadAttention`` without ``add_bias_kv`` and ``add_zero_attn``, its ``kdim`` equal
                to its ``vdim``.
            seeds: ``[M, E]``; a ``Parameter`` is shared, another tensor is copied.
            options: further arguments of the constructor but ``set_transformer``, which PyTorch's module has not.

        Raises:
            TypeError: not such a module, or seeds are no tensor. ValueError: it has what has no counterpart here, or
                seeds have another shape.
        """
        name = f"{cls.__name__}.from_torch"
        shared.check_torch(cls.__name__, module)
        if module.kdim != module.vdim:
            raise ValueError(f"{name}: module must have kdim equal to vdim, found {module.kdim} and {module.vdim}")
        if options.get("set_transformer"):
            raise ValueError(f"{name}: set_transformer must be False, for module has no such form; found True")
        if not isinstance(seeds, Tensor):
            raise TypeError(f"{name}: seeds must be a tensor [M, E], found {checks.describe(seeds)}")
        checks.Axes(name, E=module.embed_dim).bind("seeds", seeds, ("M", "E"))
        made = cls(**shared.torch_arguments(module), num_seeds=seeds.shape[0], kdim=module.kdim, **options)
        made.seeds = seeds if isinstance(seeds, nn.Parameter) else nn.Parameter(seeds.detach().clone())
        return shared.adopt(made, module)

    def to_torch(self) -> tuple[nn.MultiheadAttention, nn.Parameter]:
        """``(module, seeds)`` with the very parameters of this module: ``module(seeds, x, x)`` is what it computes.

        Raises:
            ValueError: Set Transformer's form, which ``torch.nn.MultiheadAttention`` has not.
        """
        if self.set_transformer:
            wanted = "set_transformer must be False, for torch.nn.MultiheadAttention has no such form"
            raise ValueError(f"{type(self).__name__}.to_torch: {wanted}; found True")
        return shared.as_torch(self), self.seeds
