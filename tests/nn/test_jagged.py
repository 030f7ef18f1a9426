"""Padded, nested and TorchRec batches to packed values and offsets, and back: every token keeps its position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interformer_kernels import jagged

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]

masks = st.integers(0, 5).flatmap(
    lambda rows: st.integers(0, 7).flatmap(
        lambda width: st.lists(
            st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows
        ).map(lambda cells: torch.tensor(cells, dtype=torch.bool).reshape(rows, width))
    )
)


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every element different from zero and (bool aside) from every other."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1).reshape(shape).to(dtype)


# ---------------------------------------------------------------- round trips


@settings(deadline=None, max_examples=60)
@given(mask=masks, trailing=st.sampled_from([(), (3,), (2, 2)]), dtype=st.sampled_from(DTYPES))
def test_mask_round_trip_restores_every_token(mask: Tensor, trailing: tuple[int, ...], dtype: torch.dtype) -> None:
    x = numbered(*mask.shape, *trailing, dtype=dtype)
    values, offsets, layout = jagged.from_padded(x, mask=mask)
    assert torch.equal(values, x[mask])
    assert offsets.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    back = layout.pad(values, padding_value=0)
    expected = torch.where(mask.reshape(*mask.shape, *[1] * len(trailing)), x, torch.zeros_like(x))
    assert back.dtype == dtype
    assert torch.equal(back, expected)


@settings(deadline=None, max_examples=40)
@given(mask=masks)
def test_both_polarities_and_integer_masks_agree(mask: Tensor) -> None:
    x = numbered(*mask.shape, 2)
    expected = jagged.from_padded(x, mask=mask)
    for mask_options in ({"padding_mask": ~mask}, {"mask": mask.int()}, {"padding_mask": (~mask).to(torch.uint8)}):
        actual = jagged.from_padded(x, **mask_options)
        assert torch.equal(actual.values, expected.values)
        assert torch.equal(actual.offsets, expected.offsets)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 6), max_size=5),
    extra=st.integers(0, 3),
    tail=st.integers(0, 3),
    side=st.sampled_from(jagged.SIDES),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_lengths_round_trip_on_either_side(
    lengths: list[int], extra: int, tail: int, side: str, index: torch.dtype
) -> None:
    width = max(lengths, default=0) + extra
    sizes = torch.tensor(lengths, dtype=index)
    offsets = jagged.offsets_from_lengths(sizes)
    values = torch.cat((numbered(sum(lengths), 2), torch.full((tail, 2), torch.nan)))
    padded = jagged.to_padded(values, offsets.to(index), max_length=width, padding_value=-1.0, side=side)
    assert padded.shape == (len(lengths), width, 2)
    for row, length in enumerate(lengths):
        tokens = values[offsets[row] : offsets[row + 1]]
        padding = torch.full((width - length, 2), -1.0)
        assert torch.equal(padded[row], torch.cat((tokens, padding) if side == "right" else (padding, tokens)))
    packed = jagged.from_padded(padded, lengths=sizes, side=side)
    assert torch.equal(packed.values, values[: sum(lengths)])
    assert torch.equal(packed.offsets, offsets)


def test_max_length_defaults_to_the_longest_row() -> None:
    assert jagged.to_padded(numbered(5), torch.tensor([0, 2, 2, 5])).tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]


@pytest.mark.parametrize(("rows", "width"), [(0, 0), (0, 4), (3, 0)])
def test_batches_without_tokens(rows: int, width: int) -> None:
    values, offsets, layout = jagged.from_padded(
        torch.ones(rows, width, 2), mask=torch.ones(rows, width, dtype=torch.bool)
    )
    assert values.shape == (0, 2)
    assert offsets.tolist() == [0] * (rows + 1)
    assert layout.pad(values).shape == (rows, width, 2)
    assert jagged.to_padded(values, offsets, max_length=width).shape == (rows, width, 2)
    assert jagged.to_padded(values, offsets).shape == (rows, 0, 2)


def test_layout_packs_further_tensors_and_skips_the_tail() -> None:
    mask = torch.tensor([[False, True, True], [True, False, True]])
    layout = jagged.from_padded(numbered(2, 3), mask=mask).layout
    assert layout.pack(numbered(2, 3, 2)).tolist() == [[3, 4], [5, 6], [7, 8], [11, 12]]
    assert layout.pad(torch.tensor([1.0, 2.0, 3.0, 4.0, torch.nan])).tolist() == [[0, 1, 2], [3, 0, 4]]


def test_strided_input_is_read_right() -> None:
    x = numbered(3, 2, 4).transpose(0, 1)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(jagged.from_padded(x, mask=mask).values, x[mask])


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("side", jagged.SIDES)
def test_gradients_first_and_second(side: str) -> None:
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])
    offsets = torch.tensor([0, 2, 2, 5])
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    values = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor) -> Tensor:
        packed = jagged.from_padded(x, mask=mask)
        return packed.layout.pad(packed.values**2)

    def padded(values: Tensor) -> Tensor:
        return jagged.to_padded(values**2, offsets, max_length=4, side=side)

    for function, argument in ((there_and_back, x), (padded, values)):
        assert torch.autograd.gradcheck(function, argument)
        assert torch.autograd.gradgradcheck(function, argument)


def test_padding_and_tail_get_zero_gradients() -> None:
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    mask = torch.tensor([[True, False, False], [False, True, True]])
    jagged.from_padded(x, mask=mask).values.nan_to_num().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad == 0, torch.ones(2, 3, dtype=torch.bool))
    values = torch.tensor([1.0, 2.0, torch.nan], requires_grad=True)
    (jagged.to_padded(values, torch.tensor([0, 1, 2])) * 3).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [3, 3, 0]


# ---------------------------------------------------------------- nested tensors


def test_nested_round_trip_with_gradients() -> None:
    values = numbered(7, 2).requires_grad_()
    offsets = torch.tensor([0, 3, 3, 5])
    nested = jagged.to_nested(values, offsets)
    assert [row.shape[0] for row in nested.unbind()] == [3, 0, 2]
    doubled = jagged.from_nested(nested * 2)
    assert torch.equal(doubled.values, 2 * values[:5])
    assert torch.equal(doubled.offsets, offsets)
    doubled.values.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[2, 2]] * 5 + [[0, 0]] * 2


def test_nested_rows_with_gaps_are_packed() -> None:
    nested = torch.nested.nested_tensor_from_jagged(
        numbered(6), offsets=torch.tensor([0, 3, 6]), lengths=torch.tensor([2, 1])
    )
    values, offsets = jagged.from_nested(nested)
    assert values.tolist() == [1, 2, 4]
    assert offsets.tolist() == [0, 2, 3]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_errors() -> None:
    with pytest.raises(TypeError, match=r"nested must be a nested tensor of layout torch.jagged, found a tensor \[2\]"):
        jagged.from_nested(torch.ones(2))
    strided = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"found a nested tensor of layout torch\.strided"):
        jagged.from_nested(strided)
    nested = jagged.to_nested(numbered(5, 2), torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="nested must have its ragged axis at 1"):
        jagged.from_nested(nested.transpose(1, 2))
    with pytest.raises(ValueError, match="at least one row"):
        jagged.to_nested(torch.ones(2), torch.tensor([0]))


# ---------------------------------------------------------------- TorchRec


class WithOffsets:
    """The methods of torchrec.JaggedTensor that are used."""

    def __init__(self, values: Tensor, offsets: Tensor) -> None:
        self._values, self._offsets = values, offsets

    def values(self) -> Tensor:
        return self._values

    def offsets(self) -> Tensor:
        return self._offsets


class WithLengths:
    def values(self) -> Tensor:
        return numbered(5)

    def lengths(self) -> Tensor:
        return torch.tensor([2, 0, 3], dtype=torch.int32)


class Keyed(WithLengths):
    def keys(self) -> list[str]:
        return ["item"]


def test_torchrec_round_trip() -> None:
    torchrec_tensor = jagged.to_torchrec(numbered(6), torch.tensor([0, 2, 5]), WithOffsets)
    assert isinstance(torchrec_tensor, WithOffsets)
    values, offsets = jagged.from_torchrec(torchrec_tensor)
    assert values.tolist() == [1, 2, 3, 4, 5]
    assert offsets.tolist() == [0, 2, 5]
    assert jagged.from_torchrec(WithLengths()).offsets.tolist() == [0, 2, 2, 5]


def test_torchrec_errors() -> None:
    with pytest.raises(TypeError, match=r"values\(\) and offsets\(\) or lengths\(\), found int with none of them"):
        jagged.from_torchrec(3)
    with pytest.raises(TypeError, match="the tensor of one key"):
        jagged.from_torchrec(Keyed())
    with pytest.raises(ValueError, match=r"from_torchrec: offsets\[1\] must be at most 2"):
        jagged.from_torchrec(WithOffsets(numbered(2), torch.tensor([0, 3])))
    with pytest.raises(TypeError, match="kind must be a class"):
        jagged.to_torchrec(numbered(2), torch.tensor([0, 2]), None)  # type: ignore[arg-type]


# ---------------------------------------------------------------- errors


X = torch.ones(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [
        (ValueError, "exactly one of lengths, mask and padding_mask must be given, found none", {}),
        (ValueError, "must be given, found mask, padding_mask", {"mask": MASK, "padding_mask": MASK}),
        (ValueError, r"mask must be \[B = 2, L = 3\], found shape \[3, 2\]", {"mask": MASK.T}),
        (TypeError, "padding_mask must be a bool tensor, or integers 0 and 1; found", {"padding_mask": MASK.float()}),
        (
            ValueError,
            "mask must hold 0 and 1 only, found values from 0 to 2",
            {"mask": MASK.int() * torch.tensor([0, 1, 2])},
        ),
        (ValueError, "side must be given with lengths", {"mask": MASK, "side": "left"}),
        (ValueError, "side must be one of right, left; found 'top'", {"lengths": torch.tensor([1, 2]), "side": "top"}),
        (ValueError, r"lengths\[1\] must be from 0 to L = 3, found 4", {"lengths": torch.tensor([1, 4])}),
        (ValueError, r"lengths\[0\] must be from 0 to L = 3, found -1", {"lengths": torch.tensor([-1, 2])}),
        (ValueError, r"lengths must be \[B = 2\], found shape \[1\]", {"lengths": torch.tensor([1])}),
        (TypeError, "lengths must be an int32 or int64 tensor", {"lengths": torch.tensor([1.0, 2.0])}),
        (ValueError, "mask must be on device cpu, found meta", {"mask": MASK.to("meta")}),
    ],
)
def test_from_padded_errors(kind: type[Exception], message: str, options: dict[str, object]) -> None:
    with pytest.raises(kind, match="from_padded: .*" + message):
        jagged.from_padded(X, **options)  # type: ignore[arg-type]


def test_from_padded_refuses_what_is_not_a_batch() -> None:
    with pytest.raises(TypeError, match="x must be a tensor"):
        jagged.from_padded([[1.0]], mask=MASK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must be \[B, L, ...\], found shape \[2\]"):
        jagged.from_padded(torch.ones(2), mask=MASK)


@pytest.mark.parametrize(
    ("kind", "message", "values", "offsets", "options"),
    [
        (
            ValueError,
            "max_length must be at least 3, the length of row 1, found 2",
            torch.ones(5),
            [0, 2, 5],
            {"max_length": 2},
        ),
        (TypeError, "max_length must be an int", torch.ones(5), [0, 2, 5], {"max_length": 3.0}),
        (ValueError, "side must be one of right, left", torch.ones(5), [0, 2, 5], {"side": "both"}),
        (TypeError, "padding_value must be a number", torch.ones(5), [0, 2, 5], {"padding_value": "0"}),
        (ValueError, r"offsets\[2\] must be at most 5, the number of tokens, found 6", torch.ones(5), [0, 2, 6], {}),
        (ValueError, r"offsets\[2\] must be at least 4, the entry before it, found 3", torch.ones(5), [0, 4, 3], {}),
        (ValueError, r"offsets\[0\] must be 0, found 1", torch.ones(5), [1, 2, 5], {}),
        (TypeError, "offsets must be an int32 or int64 tensor", torch.ones(5), [0.0, 5.0], {}),
        (ValueError, r"values must be \[T, ...\]", torch.tensor(1.0), [0, 0], {}),
    ],
)
def test_to_padded_errors(
    kind: type[Exception], message: str, values: Tensor, offsets: list[float], options: dict[str, object]
) -> None:
    with pytest.raises(kind, match="to_padded: .*" + message):
        jagged.to_padded(values, torch.tensor(offsets), **options)  # type: ignore[arg-type]


def test_layout_errors() -> None:
    layout = jagged.from_padded(X, mask=MASK).layout
    with pytest.raises(ValueError, match=r"x must be \[B = 2, L = 3, ...\], found shape \[3, 2\]"):
        layout.pack(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"values must be \[T >= 6, ...\], found shape \[5\]"):
        layout.pad(torch.ones(5))


def test_negative_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"lengths\[1\] must be at least 0, found -2"):
        jagged.offsets_from_lengths(torch.tensor([1, -2]))
