"""HSTU's attention by the argument names of its published implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels.nn._attention import output_only
from interformer_kernels.ops.jagged_attention import jagged_attention

NAME = "hstu_attention"


def hstu_attention(
    max_seq_len: int,
    alpha: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    causal: bool = True,
    dropout_pr: float = 0.0,
    training: bool = True,
    num_targets: Tensor | None = None,
    max_attn_len: int = 0,
    contextual_seq_len: int = 0,
    min_full_attn_seq_len: int = 0,
    backend: str | None = None,
) -> Tensor:
    r"""Pointwise attention with HSTU's masks, of rows without padding: ``hstu_mha`` of generative-recommenders.

    .. math:: A_i = \frac{1}{max\_seq\_len} \sum_{j \in V(i)} \mathrm{silu}(alpha \cdot \langle q_i, k_j \rangle)\, v_j

    It is :func:`interformer_kernels.jagged_attention` by other names, on every backend, forward and backward. With
    ``T`` tokens in ``B`` rows, ``H`` heads, ``D`` and ``Dv`` channels of a key and of a value head:

    Args:
        max_seq_len: the divisor of the sums; rows may be longer.
        alpha: factor of the scores.
        q: queries ``[T, H, D]``.
        k: keys ``[T, H, D]``.
        v: values ``[T, H, Dv]``.
        seq_offsets: ``[B+1]``, int32 or int64.
        causal: a token sees those before it, and itself.
        dropout_pr: the probability with which a weight is dropped in training.
        training: whether weights are dropped.
        num_targets: int ``[B]``: candidates at the end of each row; each sees the history and itself. It needs
            ``causal``: without it the published mask shows candidates to the history.
        max_attn_len: the farthest token that is seen; 0 is all.
        contextual_seq_len: the first tokens of a row that stand at one place, and see all of the history.
        min_full_attn_seq_len: the last tokens of the history for which ``max_attn_len`` does not hold, as for
            candidates.
        backend: as in ``jagged_attention``.

    Returns:
        ``[T, H, Dv]``; zero behind the last row.

    A row whose history is shorter than ``contextual_seq_len`` is all context; the published mask leaves its tokens
    alone with themselves.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape or value.

    Source: Zhai et al., 2024 (arXiv 2402.17152), section 3; the masks of ``generative_recommenders/ops``.
    """
    length = checks.check_count(NAME, "max_seq_len", max_seq_len, least=1)
    window = checks.check_count(NAME, "max_attn_len", max_attn_len)
    context = checks.check_count(NAME, "contextual_seq_len", contextual_seq_len)
    if num_targets is not None and not checks.check_bool(NAME, "causal", causal):
        raise ValueError(f"{NAME}: num_targets must be None without causal, found {checks.describe(num_targets)}")
    options: dict[str, Any] = {"causal": causal, "num_targets": num_targets, "backend": backend}
    if window:
        options.update(window=(window, window), full_tail=min_full_attn_seq_len)
    if context:
        options.update(num_prefix=context, prefix="index")
    if checks.check_bool(NAME, "training", training) and dropout_pr:
        options.update(dropout_p=dropout_pr, dropout_seed=torch.randint(2**62, (), device=q.device))
    out = jagged_attention(q, k, v, seq_offsets, scale=alpha, score="silu", post_scale=1.0 / length, **options)
    return output_only(out)
