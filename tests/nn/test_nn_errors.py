"""Errors of the modules name the argument, the expected value and the value found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from interformer_kernels.nn import GatedCrossAttention, JaggedSelfAttention, PersonalizedFFN, PMAPooling
from interformer_kernels.testing import offsets_of

E, H, M = 16, 4, 2
LENGTHS = (5, 0, 3)
SELF, POOL, CROSS, FFN = JaggedSelfAttention(E, H), PMAPooling(E, H), GatedCrossAttention(E, H), PersonalizedFFN(E, 6)
X, OFFSETS = torch.randn(8, E), offsets_of(LENGTHS)
MASK = torch.zeros(3, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: JaggedSelfAttention(E, 3), ValueError, "embed_dim must be a multiple of num_heads = 3, found 16"),
        (lambda: JaggedSelfAttention(E, 0), ValueError, "num_heads must be at least 1, found 0"),
        (lambda: PMAPooling(E, H, kdim=0), ValueError, "PMAPooling: kdim must be at least 1, found 0"),
        (lambda: PMAPooling(E, H, 0), ValueError, "num_seeds must be at least 1, found 0"),
        (lambda: PMAPooling(E, H, dropout=1.5), ValueError, r"dropout must lie in \[0, 1\], found 1.5"),
        (lambda: GatedCrossAttention(E, H, gate_activation="relu"), ValueError, "gate_activation must be one of"),
        (
            lambda: SELF(X, offsets=OFFSETS, key_mask=MASK),
            ValueError,
            "at most one of offsets, .* found offsets, key_mask",
        ),
        (lambda: SELF(X), ValueError, r"JaggedSelfAttention: x must be \[L, B, E\] with E = 16, found shape \[8, 16\]"),
        (lambda: SELF(X[:, :3], offsets=OFFSETS), ValueError, r"x must be \[T, E\] with E = 16, found shape \[8, 3\]"),
        (lambda: SELF(X, offsets=OFFSETS + 1), ValueError, r"JaggedSelfAttention: offsets\[0\] must be 0, found 1"),
        (
            lambda: POOL(torch.randn(6, 3, E), key_padding_mask=MASK.float()),
            TypeError,
            "PMAPooling: key_padding_mask must be a bool tensor, or integers 0 and 1; found",
        ),
        (
            lambda: POOL(torch.randn(6, 3, E), key_mask=MASK[:2]),
            ValueError,
            r"key_mask must be \[B = 3, L = 6\], found shape \[2, 6\]",
        ),
        (
            lambda: CROSS(torch.randn(2, 4, E), X, kv_offsets=OFFSETS),
            ValueError,
            "query must have the key's 3 rows, found 4",
        ),
        (
            lambda: CROSS(torch.randn(2, 3, E), X, X[:5], kv_offsets=OFFSETS),
            ValueError,
            r"value must be \[T, E\] with T = 8, E = 16",
        ),
        (lambda: FFN(X, torch.randn(2, 6), offsets=OFFSETS), ValueError, r"context must be \[B, C\] with B = 3, C = 6"),
        (lambda: PersonalizedFFN(E, 6, 5, residual=True), ValueError, "out_dim must be embed_dim = 16 with a residual"),
        (lambda: SELF.from_torch(nn.Linear(2, 2)), TypeError, "must be a torch.nn.MultiheadAttention, found Linear"),
        (
            lambda: SELF.from_torch(nn.MultiheadAttention(E, H, add_zero_attn=True)),
            ValueError,
            "add_zero_attn=False .True is not supported., found True",
        ),
        (
            lambda: SELF.from_torch(nn.MultiheadAttention(E, H, kdim=3)),
            ValueError,
            "kdim and vdim of embed_dim = 16, found 3, 16",
        ),
        (lambda: CROSS.to_torch(), ValueError, "gate_activation must be None, .* found 'sigmoid'"),
        (lambda: PMAPooling(E, H, set_transformer=True).to_torch(), ValueError, "set_transformer must be False"),
        (
            lambda: POOL.from_torch(nn.MultiheadAttention(E, H), torch.randn(M, 3)),
            ValueError,
            r"seeds must be \[M, E\] with E = 16, found shape \[2, 3\]",
        ),
        (
            lambda: PersonalizedFFN(E, 6, activation="relu").to_torch(X[0, :6]),
            ValueError,
            "activation must be 'identity'",
        ),
    ],
)
def test_errors_name_argument_wanted_and_found(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
