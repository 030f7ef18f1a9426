"""Masks of `nn.MultiheadAttention` whose form is recognised: from entries to forms, and the modules that use them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import module_budget as budget
import numpy as np
import pytest
import torch
from band_masks import BANDS, E, H, additive, attention, band, visible_of
from module_budget import perturbed, swapped
from torch import Tensor, nn

from interformer_kernels import accelerate
from interformer_kernels.nn import _mask_forms as forms
from interformer_kernels.nn._mask_forms import BandMask, read_form

# ---------------------------------------------------------------- forms


PLAIN: dict[str, tuple[Tensor, BandMask]] = {
    "full": (band(5, 5), BandMask()),
    "causal": (band(5, 5, None, 0), BandMask(upper=0)),
    "later keys": (band(5, 5, 0, None), BandMask(lower=0)),
    "causal window": (band(6, 6, -2, 0), BandMask(-2, 0)),
    "window": (band(6, 6, -1, 2), BandMask(-1, 2)),
    "window as long as the rows": (band(5, 5, -4, 0), BandMask(upper=0)),
    "window as long as the rows on both sides": (band(5, 5, -4, 4), BandMask()),
    "causal at the last key": (band(3, 5, None, 2), BandMask(upper=2)),
    "diagonal": (band(4, 4, 0, 0), BandMask(0, 0)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_forms(kind: str) -> None:
    hidden, expected = PLAIN[kind]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert read_form(additive(hidden, dtype), 3, H) == expected
        least = read_form(additive(hidden, dtype, torch.finfo(dtype).min), 3, H)
        assert isinstance(least, BandMask)
        assert least.finite == bool(hidden.any())
    assert read_form(hidden, 3, H) == expected
    by_row = read_form(hidden.repeat(3 * H, 1, 1), 3, H)
    assert by_row == expected


def test_every_small_mask() -> None:
    """Masks of 3 x 3 are recognised if and only if some band, keys and queries give their entries."""
    some = [torch.tensor(x, dtype=torch.bool)[None] for x in itertools.product((0, 1), repeat=3)]
    bands = [(a, b) for a in range(-2, 3) for b in range(a, 3)]
    possible = {
        tuple(visible_of(BandMask(*limits, keys, queries), 3, 3).flatten().tolist())
        for limits, keys, queries in itertools.product(bands, some, some)
    }
    for entries in itertools.product((False, True), repeat=9):
        visible = torch.tensor(entries).view(3, 3)
        form = read_form(~visible, 1, H)
        assert isinstance(form, BandMask) == (entries in possible)
        assert isinstance(form, str) or torch.equal(visible_of(form, 3, 3)[0], visible)


@pytest.mark.parametrize("kind", ["causal", "window", "causal window", "full"])
def test_one_other_entry_is_another_mask(kind: str) -> None:
    """A mask with one flipped entry is left, or has a form with exactly its entries (a window one shorter, say)."""
    hidden, left = PLAIN[kind][0], 0
    for i, j in itertools.product(range(hidden.shape[0]), range(hidden.shape[1])):
        other = hidden.clone()
        other[i, j] ^= True
        form = read_form(other, 1, H)
        left += form == forms.OTHER_FORM
        assert isinstance(form, str) or torch.equal(visible_of(form, *hidden.shape)[0], ~other)
        in_a_row = hidden.repeat(3 * H, 1, 1)
        in_a_row[H : 2 * H, i, j] ^= True  # A pair of one row is hidden: its form is that row's alone.
        form = read_form(in_a_row, 3, H)
        assert isinstance(form, str) or torch.equal(visible_of(form, *hidden.shape, rows=3), ~in_a_row[::H])
        in_a_row[H, i, j] ^= True
        assert read_form(in_a_row, 3, H) == forms.OTHER_HEADS
    assert left >= hidden.numel() - 4


@pytest.mark.parametrize("number", [1.0, -10000.0, 1e-30, torch.inf, torch.nan])
def test_other_numbers(number: float) -> None:
    mask = additive(band(5, 5, None, 0))
    for place in ((3, 1), (1, 3)):
        other = mask.clone()
        other[place] = number
        assert read_form(other, 1, H) == forms.OTHER_NUMBERS


@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("width", [7, 8])
def test_any_strides(offset: int, width: int) -> None:
    """Masks that start anywhere in memory, and whose heads share it."""
    hidden = band(width, width, -2, 1)
    by_row = torch.zeros(offset + 4 * width * width, dtype=torch.bool)[offset:].view(4, width, width).copy_(hidden)
    assert read_form(by_row, 2, H) == BandMask(-2, 1)
    assert read_form(by_row.transpose(1, 2), 2, H) == BandMask(-1, 2)
    assert read_form(hidden.expand(4, -1, -1), 2, H) == BandMask(-2, 1)
    assert read_form(torch.zeros(4, width, 2 * width, dtype=torch.bool)[..., ::2].copy_(hidden), 2, H) == BandMask(
        -2, 1
    )
    by_row[-1, -1, 0] = False
    assert read_form(by_row, 2, H) == forms.OTHER_HEADS


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 4, 4)])
def test_masks_without_entries(shape: tuple[int, ...]) -> None:
    assert read_form(torch.zeros(shape), 0, H) == BandMask()


# ---------------------------------------------------------------- modules: outputs and gradients


def padding_of(kind: str, lengths: list[int], width: int) -> Tensor | None:
    """bool `[B, L]`, True at padding."""
    if kind == "none":
        return None
    index = torch.arange(width).expand(len(lengths), -1)
    count = torch.tensor(lengths)[:, None]
    return {"right": index >= count, "left": index < width - count, "both": (index - 1).sub(count).ge(0) | index.eq(0)}[
        kind
    ]


def sweep() -> Iterator[tuple[str, str, str, int, int]]:
    """(band, padding, place of the padding, queries, keys)."""
    bands = "full", "causal", "window", "causal window", "long window", "later keys", "strict", "ahead"
    for kind, padding in itertools.product(bands, ("none", "right", "left", "both")):
        for place in ("beside",) if padding == "none" else ("beside", "keys", "keys and queries", "both"):
            yield kind, padding, place, 7, 7
            if place != "keys and queries":
                yield kind, padding, place, 5, 7
                yield kind, padding, place, 7, 5


def limits_of(kind: str, random: np.random.Generator, shift: int) -> tuple[int | None, int | None]:
    """The bounds of a band by its name, around a diagonal that is `shift` keys to the right."""
    near, far = int(random.integers(0, 3)), int(random.integers(0, 3))
    lower, upper = {
        "full": (None, None),
        "causal": (None, 0),
        "window": (-near, far),
        "causal window": (-near, 0),
        "long window": (-6, 1),
        "later keys": (-near, None),
        "strict": (None, -1),
        "ahead": (1, 2),
    }[kind]
    return None if lower is None else lower + shift, None if upper is None else upper + shift


@pytest.mark.parametrize("form", [torch.bool, torch.float64, torch.float32, "least"], ids=str)
def test_masks_give_pytorchs_numbers(form: Any, notices: Callable[[], list[str]]) -> None:
    """In float64, for every query; queries that see no key get zeros from the attention on either side."""
    random = np.random.default_rng(0)
    before = attention().double()
    after = copy.deepcopy(before)
    calls, cases = accelerate(after).calls()[""], list(sweep())
    for index, (kind, side, place, length, width) in enumerate(cases):
        shift = int(random.choice([0, width - length]))
        hidden = band(length, width, *limits_of(kind, random, shift))
        padding = padding_of(side, [int(random.integers(0, width)), width - 1, int(random.integers(1, width))], width)
        if padding is not None and side != "both" and index % 2:
            padding[1] = False
        given = padding if place in ("beside", "both") else None
        mask = hidden
        if place != "beside":
            assert padding is not None
            mask = hidden | padding[:, None]
            if place == "keys and queries":
                mask = mask | padding[:, :, None]
        if mask.dim() == 3 or index % 3 == 0:
            mask = (mask if mask.dim() == 3 else mask.expand(3, -1, -1)).repeat_interleave(H, 0)
        if form != torch.bool:
            number = torch.finfo(torch.float64).min if form == "least" else -torch.inf
            mask = additive(mask, torch.float64 if form == "least" else form, number)
            given = None if given is None else additive(given, mask.dtype)
        query = torch.randn(3, length, E, dtype=torch.float64)
        key = query if length == width and index % 4 else torch.randn(3, width, E, dtype=torch.float64)
        served = calls.served
        results = [_results(m, query, key, attn_mask=mask, key_padding_mask=given) for m in (before, after)]
        for name, expected, actual in zip(("out", "d query", "d key", "d weight"), *results, strict=True):
            torch.testing.assert_close(actual, expected, msg=lambda text, c=cases[index], n=name: f"{c} {n}: {text}")
        assert calls.served > served or form == "least"
    assert set(calls.unserved) <= {forms.BLIND}
    assert calls.served > len(cases) // 4
    assert form == "least" or not notices()


def _results(module: nn.Module, query: Tensor, key: Tensor, **masks: Any) -> list[Tensor]:
    same = query is key
    query = query.clone().requires_grad_()
    key = query if same else key.clone().requires_grad_()
    out = module(query, key, key, need_weights=False, **masks)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, [query, key, module.in_proj_weight], weights)]


@pytest.mark.parametrize("side", [None, "right", "left", "a row of padding"])
@pytest.mark.parametrize("kind", BANDS)
def test_masks_within_budget(kind: str, side: str | None, notices: Callable[[], list[str]]) -> None:
    before = attention()
    padding = None if side is None else budget.padding(side)
    mask = band(budget.WIDTH, budget.WIDTH, *BANDS[kind])
    merged = (mask if padding is None else mask | padding[:, None]).expand(3, -1, -1).repeat_interleave(H, 0)

    for arguments in ({"attn_mask": mask, "key_padding_mask": padding}, {"attn_mask": merged}):

        def run(module: Any, inputs: Any, arguments: dict[str, Any] = arguments) -> Tensor:
            x = inputs["x"]
            return module(x, x, x, need_weights=False, **arguments)[0]

        draw = lambda seed: budget.draw(seed, x=(budget.ROWS, budget.WIDTH, E))  # noqa: E731
        budget.assert_within_budget(before, swapped(before), draw, run, max_draws=8)
    assert not notices()


def test_batch_second_and_other_widths() -> None:
    before = perturbed(nn.MultiheadAttention(E, H, kdim=6, vdim=4))
    query, key, value = torch.randn(4, 3, E), torch.randn(6, 3, 6), torch.randn(6, 3, 4)
    mask, padding = band(4, 6, 0, 2), torch.arange(6) >= torch.tensor([[4], [6], [2]])
    results = [
        m(query, key, value, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]
        for m in (before, swapped(before))
    ]
    torch.testing.assert_close(results[1], results[0])


def test_dropout_under_a_window() -> None:
    """The seed reproduces what is dropped, and the mean of many calls is the output without dropout."""
    module = swapped(attention(dropout=0.3))
    x, mask, padding = torch.randn(2, 6, E), band(6, 6, -2, 0), torch.arange(6) >= torch.tensor([[4], [6]])

    def run() -> Tensor:
        return module(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]

    torch.manual_seed(1)
    first = run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    runs = torch.stack([run() for _ in range(400)])
    error = (runs.mean(0) - module.eval()(x, x, x, None, False, mask)[0]) / (runs.std(0) / len(runs) ** 0.5 + 1e-9)
    assert error[:, :4].abs().max() < 6


# ---------------------------------------------------------------- calls that are left


LEFT: dict[str, tuple[str, Tensor]] = {
    "heads": (forms.OTHER_HEADS, torch.stack([band(6, 6, None, 0), band(6, 6, -2, 0)]).repeat(3, 1, 1)),
    "finite, and a query without keys": (forms.BLIND, additive(band(6, 6, None, -1), number=-1e9)),
    "a bias": (forms.OTHER_NUMBERS, torch.arange(6.0).sub(torch.arange(6.0)[:, None])),
    "learned": ("an attn_mask that requires a gradient", torch.zeros(6, 6, requires_grad=True)),
    "two blocks": (forms.OTHER_FORM, ~torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()),
}


@pytest.mark.parametrize("case", LEFT)
def test_other_masks_are_left_to_pytorch(case: str, notices: Callable[[], list[str]]) -> None:
    """They give PyTorch's bits, and say so once."""
    reason, mask = LEFT[case]
    before = attention()
    after = copy.deepcopy(before)
    calls, x = accelerate(after).calls()[""], torch.randn(3, 6, E)
    results = [m(x, x, x, attn_mask=mask, need_weights=False)[0] for m in (before, after, after)]
    assert torch.equal(results[1], results[0])
    assert calls.unserved == {reason: 2}
    assert notices() == [f"MultiheadAttention takes PyTorch's own path for {reason}"]


def test_padding_can_leave_a_query_of_a_finite_mask_without_keys() -> None:
    before, x = attention(), torch.randn(2, 6, E)
    after = copy.deepcopy(before)
    calls = accelerate(after).calls()[""]
    mask = additive(band(6, 6, None, 0), number=torch.finfo(torch.float32).min)
    for blind, start in ((0, 0), (1, 1)):
        padding = additive(torch.arange(6).expand(2, -1) < start)
        results = [m(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0] for m in (before, after)]
        torch.testing.assert_close(*results)
        assert calls.unserved == ({forms.BLIND: 1} if blind else {})


@pytest.mark.parametrize("shift", [0, 2])
def test_the_hint_is_trusted_as_pytorch_does(shift: int) -> None:
    """With other numbers of queries and keys it stands for causality from the first key, whatever the mask says."""
    before, x, y = attention(), torch.randn(2, 4, E), torch.randn(2, 6, E)
    after, mask = swapped(before), band(4, 6, None, shift)
    padding = torch.arange(6) >= torch.tensor([[6], [5]])
    for given in (None, padding):
        masks = {"attn_mask": mask, "key_padding_mask": given, "is_causal": True}
        results = [m(x, y, y, need_weights=False, **masks)[0] for m in (before, after)]
        torch.testing.assert_close(*results)


def test_masks_that_pytorch_refuses() -> None:
    after, x = swapped(attention()), torch.randn(2, 6, E)
    for mask in (band(5, 6), band(6, 6).expand(3, -1, -1), band(6, 6).int(), band(6, 6)[0]):
        with pytest.raises((AssertionError, RuntimeError)):
            after(x, x, x, attn_mask=mask, need_weights=False)


def test_masks_are_left_under_the_compiler(notices: Callable[[], list[str]]) -> None:
    """Also those that were recognised before."""
    before, x, mask = attention(), torch.randn(2, 6, E), band(6, 6, -2, 0)
    after = swapped(before)
    run = lambda m: m(x, x, x, attn_mask=mask, need_weights=False)[0]  # noqa: E731
    run(after)
    assert not notices()
    compiled = torch.compile(after, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled), run(before))
    (notice,) = notices()
    assert "cannot be read under torch.compile" in notice
