"""Functions that map scores know the query, its head and the key of every score, in all kernels.

No variant needs all of that yet, so this one is the test's own: a bias for each head by the distance of query and key.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from interformer_kernels._calls import AttentionCall
from interformer_kernels._triton import _attention_variant, attention
from interformer_kernels.testing import offsets_of

HEADS, CHANNELS, SCALE = 4, 16, 0.25
# Sums of activations over 1100 keys are as large as means of a softmax.
POST_SCALE = 2**-8


@triton.jit
def _biased(products, pairs, variant, VARIANT, DTYPE):
    distance = pairs.n + (pairs.task.keys - pairs.task.count) - pairs.j
    bias = (pairs.head + 1).to(tl.float32) * tl.minimum(tl.maximum(distance, -4), 4).to(tl.float32)
    return products * variant.inputs.scale + bias * 0.125


@triton.jit
def _one(variant, VARIANT):
    return variant.inputs.scale * 0.0 + 1.0


def _eager_row(q: Tensor, k: Tensor, v: Tensor, score: str, causal: bool) -> Tensor:
    """The definition for one row."""
    q_per_kv = HEADS // k.shape[1]
    k, v = k.repeat_interleave(q_per_kv, 1), v.repeat_interleave(q_per_kv, 1)
    p, j = torch.arange(len(q))[:, None] + (len(k) - len(q)), torch.arange(len(k))
    bias = torch.arange(1, HEADS + 1)[:, None, None] * (p - j).clamp(-4, 4) * 0.125
    scores = torch.einsum("nhd,jhd->hnj", q, k) * SCALE + bias
    seen = j <= p if causal else torch.ones_like(j <= p)
    masked = scores.masked_fill(~seen, float("-inf"))
    probs = masked.softmax(-1) if score == "softmax" else F.silu(scores) * seen * POST_SCALE
    return torch.einsum("hnj,jhd->nhd", probs, v)


# Packed rows of up to 16 tokens have kernels of their own, and those of up to 128 a backward, in 16 bits. Few dense or
# shared queries take several key/value heads to a tile, and 1100 keys are split.
@pytest.mark.parametrize("score", ["softmax", "silu"])
@pytest.mark.parametrize(
    ("layout", "kv_heads", "lengths", "dtype"),
    [("packed", 2, (3, 50, 0, 20), torch.float32), ("packed", 4, (40,), torch.float32),
     ("packed", 2, (70, 40), torch.bfloat16), ("dense", 4, (1100, 3), torch.float32),
     ("shared", 2, (30, 5), torch.float32)],
)  # fmt: skip
def test_a_bias_by_head_and_distance(
    layout: str,
    kv_heads: int,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    score: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_attention_variant, "raw_scores", _biased)
    monkeypatch.setattr(_attention_variant, "score_factor", _one)
    generator = torch.Generator().manual_seed(0)
    tokens, rows, causal = sum(lengths), len(lengths), layout == "packed"
    shape = {"packed": (tokens,), "dense": (rows, 2), "shared": (2,)}[layout]
    q = torch.randn(*shape, HEADS, CHANNELS, generator=generator).to(dtype)
    k, v = torch.randn(2, tokens, kv_heads, CHANNELS, generator=generator).to(dtype)
    post_scale = 1.0 if score == "softmax" else POST_SCALE
    call = AttentionCall(
        layout, q, k, v, None, offsets_of(lengths), None, "multiply", "sigmoid", SCALE, score, post_scale, causal
    )
    out, lse, attn_out = attention.forward(call, None, False)
    grad_out = torch.randn(out.shape, generator=generator).to(dtype)
    computed = out, *attention.backward(call, grad_out, attn_out, lse)[:3]

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    q_rows = {"packed": lambda x: x.split(lengths), "dense": list, "shared": lambda x: [x] * rows}[layout](leaves[0])
    outputs = [
        _eager_row(*row, score, causal)
        for row in zip(q_rows, leaves[1].split(lengths), leaves[2].split(lengths), strict=True)
    ]
    truth = torch.cat(outputs) if layout == "packed" else torch.stack(outputs)
    expected = truth, *torch.autograd.grad(truth, leaves, grad_out.double())
    for x, y in zip(computed, expected, strict=True):
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02 * float(y.detach().abs().max())}
        torch.testing.assert_close(x.float(), y.float(), **tolerance)
