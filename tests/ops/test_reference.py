"""The definition against formulas written anew, row by row, with PyTorch's own attention where it has one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import interformer_kernels as ik
from interformer_kernels import reference
from interformer_kernels.testing import offsets_of, rotary_tables

LENGTHS_Q, LENGTHS_K = (4, 0, 7, 1, 3), (4, 5, 0, 6, 9)
H, HK, D, DV = 4, 2, 6, 5


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def rows(x: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
    return x[: sum(lengths)].split(lengths)


def naive_visible(lq: int, lk: int, causal: bool, window: tuple[int, int], prefix: int) -> Tensor:
    """The masks of docs/ops.md, one pair of query and key at a time."""
    seen = torch.zeros(lq, lk, dtype=torch.bool)
    for i, j in itertools.product(range(lq), range(lk)):
        p = i + lk - lq
        inside = (not causal or j <= p) and (window[0] < 0 or j >= p - window[0])
        inside = inside and (window[1] < 0 or j <= p + window[1])
        seen[i, j] = inside or j < prefix or i < prefix
    return seen


def naive_row(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention of one row `[L, H, D]` by PyTorch; queries that see nothing get zero."""
    mask = seen.clone()
    blind = ~mask.any(-1)
    mask[blind] = True
    if k.shape[0] == 0:
        return q.new_zeros(q.shape[0], H, DV)
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    return out.masked_fill(blind[:, None, None], 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (2, 1), (0, -1), (-1, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("lengths_k", [LENGTHS_Q, LENGTHS_K], ids=["self", "cross"])
def test_masked_softmax_attention(
    causal: bool, window: tuple[int, int], prefix: int, lengths_k: tuple[int, ...]
) -> None:
    q, k, v = draw(sum(LENGTHS_Q), H, D), draw(sum(lengths_k), HK, D), draw(sum(lengths_k), HK, DV)
    found = ik.jagged_attention(
        q, k, v, offsets_of(LENGTHS_Q), kv_offsets=offsets_of(lengths_k), causal=causal, window=window,
        num_prefix=prefix, backend="reference",
    )  # fmt: skip
    sides = zip(rows(q, LENGTHS_Q), rows(k, lengths_k), rows(v, lengths_k), strict=True)
    wanted = [naive_row(a, b, c, naive_visible(len(a), len(b), causal, window, prefix)) for a, b, c in sides]
    torch.testing.assert_close(found, torch.cat(wanted))


@pytest.mark.parametrize("score", ["identity", "relu", "silu", "gelu"])
def test_scores_without_softmax(score: str) -> None:
    act = {"identity": lambda s: s, "relu": F.relu, "silu": lambda s: s * torch.sigmoid(s)}.get(
        score, lambda s: 0.5 * s * (1 + torch.erf(s / 2**0.5))
    )
    q, k, v = draw(sum(LENGTHS_Q), 2, D), draw(sum(LENGTHS_Q), 2, D), draw(sum(LENGTHS_Q), 2, DV)
    options: dict[str, Any] = {"score": score, "scale": 0.7, "post_scale": 0.3, "causal": True}
    found = ik.jagged_attention(q, k, v, offsets_of(LENGTHS_Q), backend="reference", **options)
    wanted = []
    for a, b, c in zip(*(rows(x, LENGTHS_Q) for x in (q, k, v)), strict=True):
        s = act(0.7 * torch.einsum("ihd,jhd->hij", a, b)).tril()
        wanted.append(0.3 * torch.einsum("hij,jhe->ihe", s, c))
    torch.testing.assert_close(found, torch.cat(wanted))


def test_lse() -> None:
    q, k, v = draw(sum(LENGTHS_Q), H, D), draw(sum(LENGTHS_K), HK, D), draw(sum(LENGTHS_K), HK, DV)
    _, lse = ik.gated_cross_attention(
        q, k, v, offsets_of(LENGTHS_K), q_offsets=offsets_of(LENGTHS_Q), return_lse=True, backend="reference"
    )
    wanted = []
    for a, b in zip(rows(q, LENGTHS_Q), rows(k, LENGTHS_K), strict=True):
        s = torch.einsum("ihd,jhd->ihj", a, b.repeat_interleave(2, 1)) / D**0.5
        wanted.append(s.exp().sum(-1).log())
    torch.testing.assert_close(lse, torch.cat(wanted))


def test_pma_skips_the_prefix_and_shares_seeds() -> None:
    seeds, k, v = draw(3, H, D), draw(sum(LENGTHS_K), HK, D), draw(sum(LENGTHS_K), HK, DV)
    found = ik.pma_pooling(seeds, k, v, offsets_of(LENGTHS_K), skip_prefix=4, backend="reference")
    wanted = []
    for b, c in zip(rows(k, LENGTHS_K), rows(v, LENGTHS_K), strict=True):
        wanted.append(naive_row(seeds, b[4:], c[4:], torch.ones(3, max(len(b) - 4, 0), dtype=torch.bool)))
    torch.testing.assert_close(found, torch.stack(wanted))


def test_folded_projections_equal_projected_tokens() -> None:
    """As docs/ops.md has it: fold the key projection into the seeds, pool the raw tokens once, project the result."""
    e, t = 8, sum(LENGTHS_K)
    x, w_k, w_v, q = draw(t, e), draw(e, H, D), draw(e, H, D), draw(3, H, D)
    bias_k, bias_v = draw(H, D), draw(H, D)
    k = torch.einsum("te,ehd->thd", x, w_k) + bias_k
    v = torch.einsum("te,ehd->thd", x, w_v) + bias_v
    offsets = offsets_of(LENGTHS_K)
    wanted = ik.pma_pooling(q, k, v, offsets, backend="reference")
    folded = torch.einsum("mhd,ehd->mhe", q, w_k)
    pooled = ik.pma_pooling(folded, x[:, None], None, offsets, scale=D**-0.5, backend="reference")
    filled = offsets.diff().gt(0).double()[:, None, None, None]
    found = torch.einsum("bmhe,ehd->bmhd", pooled, w_v) + bias_v * filled
    torch.testing.assert_close(found, wanted)


GATES = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu, "identity": lambda x: x}


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("shape", [(sum(LENGTHS_Q), H, DV), (sum(LENGTHS_Q), H, 1), (H, DV), ()], ids=str)
def test_gate_and_residual(activation: str, shape: tuple[int, ...]) -> None:
    q, k, v = (draw(sum(LENGTHS_Q), H, size) for size in (D, D, DV))
    gate, residual = draw(*shape), draw(sum(LENGTHS_Q), H, DV)
    plain = ik.jagged_attention(q, k, v, offsets_of(LENGTHS_Q), backend="reference")
    for form, wanted in (
        ("multiply", residual + plain * GATES[activation](gate)),
        ("self", residual + GATES[activation](plain * gate)),
    ):
        found = ik.jagged_attention(
            q, k, v, offsets_of(LENGTHS_Q), gate=gate, gate_form=form, gate_activation=activation, residual=residual,
            backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_complex_rotation(interleaved: bool) -> None:
    x, rotated = draw(sum(LENGTHS_Q), H, 8), 6
    cos, sin = rotary_tables(16, rotated)
    found = ik.apply_rotary(x, offsets_of(LENGTHS_Q), (cos, sin), interleaved=interleaved, backend="reference")
    place = torch.cat([torch.arange(n) for n in LENGTHS_Q])
    turn = torch.complex(cos.double(), sin.double())[place][:, None]
    y, half = x.clone(), rotated // 2
    first, second = (
        (slice(0, rotated, 2), slice(1, rotated, 2)) if interleaved else (slice(0, half), slice(half, rotated))
    )
    z = torch.complex(x[..., first], x[..., second]) * turn
    y[..., first], y[..., second] = z.real, z.imag
    torch.testing.assert_close(found, y)


def test_rotary_inside_attention_equals_rotating_first() -> None:
    q, k, v = draw(sum(LENGTHS_Q), H, 8), draw(sum(LENGTHS_K), HK, 8), draw(sum(LENGTHS_K), HK, DV)
    rope, offsets, kv_offsets = rotary_tables(32, 8), offsets_of(LENGTHS_Q), offsets_of(LENGTHS_K)
    at_q, at_k = torch.randint(32, (q.shape[0],)), torch.randint(32, (k.shape[0],))
    found = ik.jagged_attention(
        q, k, v, offsets, kv_offsets=kv_offsets, rope=rope, rope_positions=(at_q, at_k), backend="reference"
    )
    turned_q = ik.apply_rotary(q, offsets, rope, positions=at_q, backend="reference")
    turned_k = ik.apply_rotary(k, kv_offsets, rope, positions=at_k, backend="reference")
    wanted = ik.jagged_attention(turned_q, turned_k, v, offsets, kv_offsets=kv_offsets, backend="reference")
    torch.testing.assert_close(found, wanted)


def test_personalized_ffn() -> None:
    x, weight, bias = draw(sum(LENGTHS_Q), 3), draw(5, 3, 4), draw(5, 4)
    residual = draw(sum(LENGTHS_Q), 4)
    found = ik.personalized_ffn(
        x, weight, offsets_of(LENGTHS_Q), bias=bias, activation="silu", residual=residual, backend="reference"
    )
    wanted = [F.silu(a @ w + b) for a, w, b in zip(rows(x, LENGTHS_Q), weight, bias, strict=True)]
    torch.testing.assert_close(found, residual + torch.cat(wanted))


def test_softmax_and_sum_of_rows_are_attention_by_its_scores() -> None:
    scores, v, offsets = draw(sum(LENGTHS_K) + 2, H), draw(sum(LENGTHS_K) + 2, H, D), offsets_of(LENGTHS_K)
    scores[1], scores[sum(LENGTHS_K) :] = -torch.inf, torch.nan
    weights = ik.jagged_softmax(scores, offsets, backend="reference")
    assert not weights[sum(LENGTHS_K) :].any()
    found = ik.jagged_weighted_sum(weights, v, offsets, backend="reference")
    for row, s, w, x in zip(found, *(rows(x, LENGTHS_K) for x in (scores, weights, v)), strict=True):
        e = s.exp()
        torch.testing.assert_close(w, e / e.sum(0))
        torch.testing.assert_close(row, (w[:, :, None] * x).sum(0))


def test_the_widest_window_and_prefix_do_not_overflow() -> None:
    q, offsets = draw(sum(LENGTHS_Q), 2, D), offsets_of(LENGTHS_Q)
    widest = 2**63 - 1
    wanted = ik.jagged_attention(q, q, q, offsets, backend="reference")
    for options in ({"window": (widest, widest)}, {"num_prefix": widest, "causal": True}):
        assert torch.equal(ik.jagged_attention(q, q, q, offsets, backend="reference", **options), wanted)
    assert not ik.pma_pooling(q[:2], q, None, offsets, skip_prefix=widest, backend="reference").any()


def test_padding_of_a_group_stays_below_double() -> None:
    lengths = torch.tensor([0, 1, 2, 3, 4, 5, 300, 17, 1000])
    spans = reference.Spans(torch.zeros_like(lengths), lengths)
    seen = []
    for group in reference.similar_rows(spans):
        seen += group.tolist()
        assert int(lengths[group].max()) < 2 * max(int(lengths[group].min()), 1) or int(lengths[group].max()) <= 1
    assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("offsets", [[-5, 3, 2, 99], [7, 7, 0, 3], [0, 1000, -1000, 8]], ids=str)
def test_corrupt_offsets_are_clamped_when_not_validated(offsets: list[int]) -> None:
    ik.set_validation("off")
    q = draw(8, 2, 4)
    x = torch.tensor(offsets)
    ik.jagged_attention(q, q, q, x, backend="reference")
    ik.pma_pooling(q[:2], q, None, x, backend="reference")
    ik.personalized_ffn(q[:, 0], draw(3, 4, 4), x, backend="reference")
    ik.apply_rotary(q, x, rotary_tables(4, 4), backend="reference")
    ik.jagged_weighted_sum(ik.jagged_softmax(q[..., 0], x, backend="reference"), q, x, backend="reference")
