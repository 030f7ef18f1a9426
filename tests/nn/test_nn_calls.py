"""The modules called like `nn.MultiheadAttention`, and with lengths in place of a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interformer_kernels.nn import GatedCrossAttention, JaggedSelfAttention, PersonalizedFFN, PMAPooling

E, H = 16, 4
X, LENGTHS = torch.randn(3, 6, E), torch.tensor([4, 0, 6])
PADDING = torch.arange(6) >= LENGTHS[:, None]
CONTEXT, QUERY = torch.randn(3, 5), torch.randn(3, 2, E)


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_is_called_as_pytorchs(causal: bool) -> None:
    """Arguments are passed by position and by name; the result is the output without weights."""
    original = nn.MultiheadAttention(E, H, batch_first=True)
    ported = JaggedSelfAttention.from_torch(original, causal=causal)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1) if causal else None
    expected = original(X, X, X, key_padding_mask=PADDING, attn_mask=hidden, need_weights=False)[0]
    options: dict[str, Any] = {"need_weights": False, "average_attn_weights": True, "is_causal": causal}
    calls: list[Callable[[], Tensor]] = [
        lambda: ported(X, X, X, key_padding_mask=PADDING),
        lambda: ported(X, X, X, PADDING, False, None, True, causal),
        lambda: ported(query=X, key=X, value=X, key_padding_mask=PADDING, attn_mask=None, **options),
        lambda: ported(X, key_padding_mask=PADDING),
    ]
    for call in calls:
        torch.testing.assert_close(call()[~PADDING], expected[~PADDING])


def test_cross_attention_is_called_as_pytorchs() -> None:
    original = nn.MultiheadAttention(E, H, batch_first=True)
    ported = GatedCrossAttention.from_torch(original)
    padding = PADDING.clone()
    padding[1] = False
    expected = original(QUERY, X, X, key_padding_mask=padding, need_weights=False)[0]
    for actual in (
        ported(QUERY, X, X, padding, False),
        ported(
            query=QUERY, key=X, value=X, key_padding_mask=padding, need_weights=False, attn_mask=None, is_causal=False
        ),
    ):
        torch.testing.assert_close(actual, expected)


MODULES: dict[str, tuple[nn.Module, Callable[..., Tensor]]] = {
    "self": (JaggedSelfAttention(E, H, batch_first=True), lambda m, x, **kw: m(x, **kw)),
    "pooling": (PMAPooling(E, H, 2, batch_first=True), lambda m, x, **kw: m(x, **kw)),
    "cross": (GatedCrossAttention(E, H, batch_first=True), lambda m, x, **kw: m(QUERY, x, **kw)),
    "ffn": (PersonalizedFFN(E, 5, E, batch_first=True), lambda m, x, **kw: m(x, CONTEXT, **kw)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths(name: str, dtype: torch.dtype) -> None:
    """Lengths equal a mask of a padded batch and the offsets of a packed one."""
    module, call = MODULES[name]
    lengths = LENGTHS.to(dtype)
    assert torch.equal(call(module, X, lengths=lengths), call(module, X, key_padding_mask=PADDING))
    offsets = torch.tensor([0, 4, 4, 10])
    rows = {"kv_offsets" if name == "cross" else "offsets": offsets}
    packed = X[~PADDING]
    assert torch.equal(call(module, packed, lengths=lengths), call(module, packed, **rows))


SELF = MODULES["self"][0]
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: SELF(X, QUERY, X), ValueError, "key must be x itself"),
    (lambda: SELF(X, X, X.clone()), ValueError, "value must be x itself"),
    (lambda: SELF(), TypeError, "exactly one of x and query .PyTorch.s name for x. must be given; found neither"),
    (lambda: SELF(X, query=X), TypeError, "must be given; found both"),
    (lambda: SELF(X, X, X, need_weights=True), ValueError, "need_weights must be False, because the ops return no"),
    (lambda: SELF(X, X, X, need_weights=1), TypeError, "need_weights must be a bool, found 1"),
    (lambda: SELF(X, X, X, attn_mask=torch.ones(6, 6)), ValueError, "attn_mask must be None .* found a tensor"),
    (lambda: SELF(X, X, X, is_causal=True), ValueError, "is_causal must be False, as in the constructor; found True"),
    (lambda: MODULES["cross"][0](QUERY, X, X, need_weights=True), ValueError, "need_weights must be False"),
    (lambda: SELF(X, lengths=torch.tensor([4, 0, 7])), ValueError, r"lengths\[2\] must be from 0 to L = 6, found 7"),
    (lambda: SELF(X, lengths=torch.tensor([4, 0])), ValueError, r"lengths must be \[B = 3\]"),
    (lambda: SELF(X, lengths=LENGTHS.float()), TypeError, "lengths must be an int32 or int64 tensor"),
    (lambda: SELF(X[0], lengths=torch.tensor([4, 7])), ValueError, r"lengths.* must be at most 6"),
    (lambda: SELF(X, lengths=LENGTHS, key_padding_mask=PADDING), ValueError, "found key_padding_mask, lengths"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_errors(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
