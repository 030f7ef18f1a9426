"""Masks of `nn.MultiheadAttention` are read once, and again when they were written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from band_masks import BANDS, E, H, additive, attention, band
from module_budget import perturbed, swapped
from torch import Tensor, nn

from interformer_kernels import accelerate
from interformer_kernels.nn import _mask_forms as forms
from interformer_kernels.nn._mask_forms import read_form


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each mask that is read."""
    log: list[int] = []

    def counted(mask: Tensor, rows: int, heads: int) -> forms.Form:
        log.append(mask.numel())
        return read_form(mask, rows, heads)

    monkeypatch.setattr(forms, "read_form", counted)
    return log


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["bool", "additive", "by row", "large"])
def test_a_mask_is_read_once_for_all_layers_and_calls(kind: str, training: bool, reads: list[int]) -> None:
    width = 260 if kind == "large" else 6
    hidden = band(width, width, -2, 0)
    mask = {"additive": additive(hidden), "by row": hidden.repeat(3 * H, 1, 1)}.get(kind, hidden)
    layer = nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True)
    before = perturbed(nn.TransformerEncoder(layer, 2)).train(training)
    after, x = swapped(before), torch.randn(3, width, E)
    # Each query sees a key: PyTorch's inference path gives NaN to others, and the next layer spreads it.
    padding = torch.arange(width) >= torch.tensor([[width - 1], [width], [width - 2]])
    for call in range(3):
        given = None if kind == "additive" else padding
        with torch.inference_mode(not training and call < 2):
            results = [m(x, mask=mask, src_key_padding_mask=given) for m in (before, after)]
        seen = slice(None) if given is None else ~padding
        torch.testing.assert_close(results[1][seen], results[0][seen])
    assert len(reads) == 1
    after(x, mask=mask.clone())
    assert len(reads) == 2


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda mask: mask[3:].fill_(False),
    "by a view": lambda mask: mask.view(-1)[-3:].zero_(),
    "by a detached tensor": lambda mask: mask.detach()[0].zero_(),
    "by data": lambda mask: mask.data[2].zero_(),
    "by numpy": lambda mask: mask.numpy().__setitem__((2, 0), True),
    "other data": lambda mask: setattr(mask, "data", torch.zeros_like(mask)),
    "in inference mode": lambda mask: _in_inference_mode(mask),
}


def _in_inference_mode(mask: Tensor) -> None:
    with torch.inference_mode():
        mask[4, 1] = True


# Writes through `.data` are seen in small masks alone, as versions do not tell.
@pytest.mark.parametrize(("how", "width"), [(h, n) for h in WRITES for n in (6, 260) if (h, n) != ("by data", 260)])
def test_a_mask_that_is_written_is_read_again(how: str, width: int, reads: list[int]) -> None:
    before, x, mask = attention(), torch.randn(2, width, E), band(width, width, -2, 0)
    if how == "by numpy":
        mask = torch.from_numpy(mask.numpy())
    after = swapped(before)
    for _ in range(2):
        for _ in range(2):
            results = [m(x, x, x, attn_mask=mask, need_weights=False)[0] for m in (before, after)]
            torch.testing.assert_close(*results)
        WRITES[how](mask)
    assert len(reads) == (4 if width == 260 and how == "by numpy" else 2)


def test_masks_made_in_inference_mode(reads: list[int]) -> None:
    """They have no version; a training step that uses a form read in inference mode can still save it."""
    before, x = attention(), torch.randn(2, 6, E)
    after = swapped(before)
    with torch.inference_mode():
        mask = band(6, 6, None, -1)
        for m in (before, after, after):
            m(x, x, x, attn_mask=mask, need_weights=False)
        assert len(reads) == 1
        mask[0, 0] = False
        torch.testing.assert_close(*(m(x, x, x, attn_mask=mask, need_weights=False)[0] for m in (after, before)))
        assert len(reads) == 2
    plain = band(6, 6, None, -1)
    with torch.inference_mode():
        after(x, x, x, attn_mask=plain, need_weights=False)
    x.requires_grad_()
    after(x, x, x, attn_mask=plain, need_weights=False)[0].sum().backward()
    assert len(reads) == 3


def test_a_mask_of_other_heads_is_another_mask(reads: list[int]) -> None:
    mask, x = band(6, 6, -2, 0).repeat(8, 1, 1), torch.randn(4, 6, E)
    for heads in (2, 4, 2):
        before = perturbed(nn.MultiheadAttention(E, heads, batch_first=True))
        y = x[: 8 // heads]
        results = [m(y, y, y, attn_mask=mask, need_weights=False)[0] for m in (before, swapped(before))]
        torch.testing.assert_close(*results)
    assert len(reads) == 2


def test_nothing_is_kept_of_masks_that_are_gone() -> None:
    known = len(forms._seen)
    mask = band(6, 6, -2, 0)
    forms.form_of(mask, 1, H)
    forms.additive_of(mask, torch.float32)
    assert len(forms._seen) == known + 1
    del mask
    assert len(forms._seen) == known


def test_forms_are_not_kept_from_transforms() -> None:
    """A form read inside of a transform holds its wrappers, which are dead after it."""
    module, x, mask = swapped(attention()), torch.randn(3, 2, 6, E), band(6, 6, None, -1)
    padding = torch.arange(6) >= torch.tensor([[4], [6]])
    run = lambda x: module(x, x, x, padding, False, mask)[0].square().sum()  # noqa: E731
    inside = torch.vmap(torch.func.grad(run))(x)
    x.requires_grad_()
    (outside,) = torch.autograd.grad(sum(run(y) for y in x), x)
    torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize("kind", BANDS)
def test_autocast(kind: str) -> None:
    before, x = attention(), torch.randn(2, 6, E)
    mask, padding = band(6, 6, *BANDS[kind]), torch.arange(6) >= torch.tensor([[4], [6]])
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (m(x, x, x, padding, False, mask)[0] for m in (before, swapped(before)))
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)


def test_whole_transformer() -> None:
    """The decoder's attention is served under the masks that PyTorch's own function makes."""
    before = perturbed(nn.Transformer(E, H, 1, 1, 2 * E, dropout=0.0, batch_first=True), 0.05)
    after = copy.deepcopy(before)
    calls = accelerate(after).calls()
    source, target = torch.randn(2, 7, E), torch.randn(2, 5, E)
    padding = additive(torch.arange(7) >= torch.tensor([[4], [7]]))
    masks = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(5), "memory_mask": additive(band(5, 7, -1, 3))}
    paddings = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    expected, actual = (m(source, target, **masks, **paddings) for m in (before, after))
    torch.testing.assert_close(actual, expected)
    assert {count.served for count in calls.values()} == {1}
