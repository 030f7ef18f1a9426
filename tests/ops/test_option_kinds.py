"""Options and inputs of unusual kinds: scalars of numpy and of tensors serve, the rest is refused in a short line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import interformer_kernels as ik
from interformer_kernels import jagged, testing
from interformer_kernels.testing import Case, offsets_of

MOST = 400  # characters of any message


def inputs(op: str) -> dict[str, Any]:
    case = Case(op, "", lengths=(3, 0, 2), tail=0, rope=4, gate="full" if "att" in op or op == "pma_pooling" else "")
    made = testing.make_inputs(case, torch.float32)
    del made["grad_out"]
    return made


X = torch.randn(5, 8)
PADDED = torch.randn(3, 4, 2)
OFFSETS = offsets_of((3, 0, 2))
SELF, POOL, CROSS, FFN = "JaggedSelfAttention", "PMAPooling", "GatedCrossAttention", "PersonalizedFFN"

# The functions and modules that take options: by name, a call with one of them.
CALLS: dict[str, Callable[..., Any]] = {
    op: lambda op=op, **o: getattr(ik, op)(**{**inputs(op), **o}) for op in testing.OPS
}
CALLS |= {
    SELF: lambda **o: ik.nn.JaggedSelfAttention(**{"embed_dim": 8, "num_heads": 2, **o})(X, offsets=OFFSETS),
    POOL: lambda **o: ik.nn.PMAPooling(**{"embed_dim": 8, "num_heads": 2, **o})(X, offsets=OFFSETS),
    CROSS: lambda **o: ik.nn.GatedCrossAttention(**{"embed_dim": 8, "num_heads": 2, **o})(
        X, X, q_offsets=OFFSETS, kv_offsets=OFFSETS
    ),
    FFN: lambda **o: ik.nn.PersonalizedFFN(**{"embed_dim": 8, "context_dim": 3, **o})(
        X, torch.ones(3, 3), offsets=OFFSETS
    ),
    "to_padded": lambda **o: jagged.to_padded(X, OFFSETS, **o),
}
ATTENTION = ("jagged_attention", "pma_pooling", "gated_cross_attention")
NUMBERS = [(op, "scale", 0.5) for op in ATTENTION] + [(SELF, "dropout", 0.0), (POOL, "dropout", 0.0)]
NUMBERS += [(op, "post_scale", 1.0) for op in ATTENTION] + [("to_padded", "padding_value", 2.5)]
COUNTS = [("jagged_attention", "num_prefix", 1), ("pma_pooling", "skip_prefix", 1), ("to_padded", "max_length", 4)]
COUNTS += [(SELF, "num_prefix", 1), (SELF, "embed_dim", 8), (SELF, "num_heads", 2), (POOL, "num_seeds", 2)]
COUNTS += [(POOL, "kdim", 8), (CROSS, "vdim", 8), (FFN, "embed_dim", 8), (FFN, "context_dim", 3), (FFN, "out_dim", 6)]
FLAGS = [("jagged_attention", "causal"), ("jagged_attention", "rope_interleaved"), ("apply_rotary", "interleaved")]
FLAGS += [(op, "return_lse") for op in ATTENTION] + [(SELF, "causal"), (SELF, "rope_interleaved")]


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def run(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return CALLS[name](**options)


def refused(kind: type[Exception], name: str, option: str, value: Any) -> None:
    with pytest.raises(kind) as caught:
        run(name, **{option: value})
    said = str(caught.value)
    assert said.startswith(f"{name}: "), said
    assert option in said
    assert len(said) < MOST
    assert "\n" not in said


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, torch.tensor], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("name", "option", "value"), NUMBERS)
def test_numbers_of_other_libraries(name: str, option: str, value: float, kind: Any) -> None:
    same(run(name, **{option: kind(value)}), run(name, **{option: value}))
    for wrong in (np.complex64(1), np.ones(1), torch.ones(1), torch.ones((), device="meta"), [1.0], "1"):
        refused(TypeError, name, option, wrong)
    if name != "to_padded":  # padding may be NaN, and is True or False among bools
        refused(TypeError, name, option, np.bool_(True))
        refused(TypeError, name, option, torch.tensor(True))
        refused(ValueError, name, option, kind(float("nan")))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, torch.tensor], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("name", "option", "value"), COUNTS)
def test_counts_of_other_libraries(name: str, option: str, value: int, kind: Any) -> None:
    same(run(name, **{option: kind(value)}), run(name, **{option: value}))
    for wrong in (np.float32(1), torch.tensor(1.0), np.bool_(True), torch.tensor(True), np.ones(1, dtype=int), "1"):
        refused(TypeError, name, option, wrong)
    for wrong in (2**63, 10**400, np.uint64(2**63), -(10**400), np.int8(-1)):
        refused(ValueError, name, option, wrong)


@pytest.mark.parametrize(("name", "option"), FLAGS)
def test_flags_of_other_libraries(name: str, option: str) -> None:
    for value in (True, False):
        for kind in (np.bool_, torch.tensor):
            same(run(name, **{option: kind(value)}), run(name, **{option: value}))
    for wrong in (1, np.int64(1), torch.tensor(1), torch.tensor([True]), "yes", None):
        refused(TypeError, name, option, wrong)


@pytest.mark.parametrize("name", ["jagged_attention", SELF])
def test_windows_of_other_libraries(name: str) -> None:
    wanted = run(name, window=(1, 2**70))
    same(run(name, window=(np.int64(1), 2**62)), wanted)
    same(run(name, window=[torch.tensor(1), 2**63 - 1]), wanted)
    for wrong in (np.array([1, 1]), torch.tensor([1, 1]), 1, (1, 2.0), (1, 2, 3)):
        refused(TypeError, name, "window", wrong)
    refused(ValueError, name, "window", (-(10**400), 0))


@pytest.mark.parametrize(("name", "option", "value"), [n for n in NUMBERS if n[0] in ATTENTION])
def test_numbers_beyond_any_float(name: str, option: str, value: float) -> None:
    for wrong in (10**400, -(10**5000), float("inf")):
        refused(ValueError, name, option, wrong)


def test_an_option_that_requires_a_gradient_is_refused() -> None:
    """It would get none."""
    refused(ValueError, "jagged_attention", "scale", torch.tensor(0.5, requires_grad=True))


def test_padding_values_that_the_dtype_cannot_hold() -> None:
    whole = torch.arange(5)
    for values, value in ((whole, 0.5), (whole, 2**63), (whole, float("nan")), (X, 1e39), (X, 10**400)):
        with pytest.raises(ValueError, match="to_padded: padding_value must be a number of torch.* found") as caught:
            jagged.to_padded(values, OFFSETS, padding_value=value)
        assert len(str(caught.value)) < MOST
    assert jagged.to_padded(X, OFFSETS, padding_value=float("-inf"))[1].isneginf().all()
    assert (jagged.to_padded(whole, OFFSETS, padding_value=-1.0)[1] == -1).all()


# ---------------------------------------------------------------- messages


class Loud:
    def __repr__(self) -> str:
        return "loud\n" * 10_000


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no")


HUGE: dict[str, Any] = {
    "list": list(range(100_000)),
    "nested list": [[list(range(1000))] * 1000] * 1000,
    "dict": {str(i): i for i in range(10_000)},
    "array": np.zeros((300, 300)),
    "array of objects": np.array([list(range(10_000))], dtype=object),
    "string": "x" * 100_000,
    "bytes": b"x" * 100_000,
    "int": 10**5000,
    "ints": [10**5000],
    "loud": Loud(),
    "broken": Broken(),
    "tensor": torch.zeros([1] * 60),
}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("op", testing.OPS)
def test_messages_are_one_short_line(op: str, value: Any) -> None:
    """Whatever argument the value is given for."""
    said = 0
    for name in inputs(op) | {"backend": None, "scale": None, "window": None, "causal": None, "residual": None}:
        with pytest.raises((TypeError, ValueError)) as caught:
            getattr(ik, op)(**{**inputs(op), name: value})
        if "unexpected keyword" not in str(caught.value):
            assert str(caught.value).startswith(f"{op}: ")
            assert len(str(caught.value)) < MOST
            assert "\n" not in str(caught.value)
            said += 1
    assert said >= len(inputs(op))


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
def test_messages_of_converters_are_one_short_line(value: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: jagged.offsets_from_lengths(value),
        lambda: jagged.to_padded(X, value),
        lambda: jagged.to_padded(X, OFFSETS, side=value),
        lambda: jagged.to_padded(X, OFFSETS, max_length=value),
        lambda: jagged.to_padded(X, OFFSETS, padding_value=value),
        lambda: jagged.from_padded(PADDED, lengths=value),
        lambda: jagged.from_padded(PADDED, mask=value),
        lambda: jagged.from_nested(value),
        lambda: jagged.to_nested(X, value),
        lambda: jagged.from_torchrec(value),
        lambda: jagged.to_torchrec(X, OFFSETS, value),
        lambda: ik.set_validation(value),
        lambda: ik.nn.PMAPooling(8, value),
        lambda: ik.nn.PMAPooling(8, 2)(value, offsets=OFFSETS),
        lambda: ik.nn.PMAPooling(8, 2)(X, offsets=value),
        lambda: ik.nn.PersonalizedFFN(8, 3)(X, value, offsets=OFFSETS),
        lambda: ik.nn.GatedCrossAttention(8, 2)(X, X, value, q_offsets=OFFSETS, kv_offsets=OFFSETS),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert len(str(caught.value)) < MOST
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- tensors that are not dense


def _others(x: Tensor) -> dict[str, Tensor]:
    found = {"sparse": x.detach().to_sparse()}
    if x.dim() == 2:
        found["csr"] = x.detach().to_sparse_csr()
    if x.dim() >= 2:
        found["nested"] = torch.nested.nested_tensor([x.detach(), x.detach()])
        found["jagged"] = torch.nested.nested_tensor([x.detach(), x.detach()], layout=torch.jagged)
    if x.is_floating_point():
        found["quantized"] = torch.quantize_per_tensor(x.detach().nan_to_num(0), 0.1, 0, torch.quint8)
    return found


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:Sparse", "ignore:.*quantize", "ignore:.*quint8")
@pytest.mark.parametrize("op", testing.OPS)
def test_tensors_that_are_not_dense_are_refused(op: str) -> None:
    made = inputs(op)
    for name, x in made.items():
        for kind, other in _others(x).items() if isinstance(x, Tensor) else ():
            with pytest.raises(TypeError, match=f"^{op}: {name} must be .*tensor") as caught:
                getattr(ik, op)(**{**made, name: other})
            assert len(str(caught.value)) < MOST, kind
        if name == "rope":
            with pytest.raises(TypeError, match=f"^{op}: rope's sin must be"):
                getattr(ik, op)(**{**made, name: (x[0], x[1].to_sparse())})


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:Sparse", "ignore:.*quantize", "ignore:.*quint8")
def test_converters_and_modules_refuse_tensors_that_are_not_dense() -> None:
    lengths = torch.tensor([3, 0, 2])
    mask = torch.ones(3, 4, dtype=torch.int64)
    calls: list[tuple[Tensor, Callable[[Tensor], Any], str]] = [
        (X, lambda x: jagged.to_padded(x, OFFSETS), "values"),
        (OFFSETS, lambda x: jagged.to_padded(X, x), "offsets"),
        (PADDED, lambda x: jagged.from_padded(x, lengths=lengths), "x"),
        (lengths, lambda x: jagged.from_padded(PADDED, lengths=x), "lengths"),
        (mask, lambda x: jagged.from_padded(PADDED, padding_mask=x), "padding_mask"),
        (lengths, jagged.offsets_from_lengths, "lengths"),
        (X, lambda x: jagged.to_nested(x, OFFSETS), "values"),
        (X, lambda x: jagged.to_torchrec(x, OFFSETS, dict), "values"),
        (X, lambda x: ik.nn.JaggedSelfAttention(8, 2)(x, offsets=OFFSETS), "x"),
        (OFFSETS, lambda x: ik.nn.PMAPooling(8, 2)(X, offsets=x), "offsets"),
        (torch.ones(3, 3), lambda x: ik.nn.PersonalizedFFN(8, 3)(X, x, offsets=OFFSETS), "context"),
    ]
    for x, call, name in calls:
        for other in _others(x).values():
            with pytest.raises(TypeError, match=rf": {name} must be"):
                call(other)


# ---------------------------------------------------------------- TorchRec's empty tensor; contents are read by consent


class Empty:
    """As TorchRec's `JaggedTensor.empty()`: no entry at all in its offsets."""

    def values(self) -> Tensor:
        return torch.empty(0, 4)

    def offsets(self) -> Tensor:
        return torch.empty(0, dtype=torch.int32)

    def lengths(self) -> Tensor:
        return torch.empty(0, dtype=torch.int32)


def test_an_empty_torchrec_tensor_has_no_rows() -> None:
    values, offsets = jagged.from_torchrec(Empty())
    assert values.shape == (0, 4)
    same(offsets, torch.zeros(1, dtype=torch.int32))
    assert ik.pma_pooling(torch.randn(1, 1, 4), values[:, None], None, offsets).shape == (0, 1, 1, 4)


def test_contents_are_read_where_validation_says_so() -> None:
    wrong = torch.tensor([2, -1, 3])
    with pytest.raises(ValueError, match=r"lengths\[1\] must be at least 0, found -1"):
        jagged.offsets_from_lengths(wrong)
    with pytest.raises(ValueError, match="lengths"):
        jagged.from_padded(PADDED, lengths=wrong)
    with pytest.raises(ValueError, match="mask must hold 0 and 1 only"):
        jagged.from_padded(PADDED, mask=torch.full((3, 4), 2))
    ik.set_validation("off")
    same(jagged.offsets_from_lengths(wrong), torch.tensor([0, 2, 1, 4]))
    assert jagged.from_padded(PADDED, lengths=torch.tensor([2, -1, 9])).values.shape == (6, 2)
    assert jagged.from_padded(PADDED, mask=torch.full((3, 4), 2)).values.shape == (12, 2)


def test_offsets_from_lengths_is_one_graph() -> None:
    torch._dynamo.reset()

    def pool(x: Tensor, lengths: Tensor) -> Any:
        return ik.pma_pooling(torch.ones(1, 1, 8), x[:, None], None, jagged.offsets_from_lengths(lengths))

    compiled = torch.compile(pool, fullgraph=True, dynamic=True, backend="eager")
    same(compiled(X, torch.tensor([3, 0, 2])), pool(X, torch.tensor([3, 0, 2])))
    with pytest.raises(ValueError, match=r"offsets\[3\] must be at least 5"):
        compiled(X, torch.tensor([3, 2, -1]))


def test_an_option_is_checked_whatever_was_right_before() -> None:
    """Options that have passed once are not checked anew, and numbers of several kinds compare equal."""
    offsets, k = torch.tensor([0, 3, 4]), torch.randn(4, 2, 8)
    for number in (1, True, 1.0, 1):
        if type(number) is int:
            ik.jagged_attention(k, k, k, offsets, num_prefix=number)
        else:
            with pytest.raises(TypeError, match="^jagged_attention: num_prefix must be an int"):
                ik.jagged_attention(k, k, k, offsets, num_prefix=number)  # type: ignore[arg-type]
    for flag in (True, 1, False, 0):
        if type(flag) is bool:
            ik.jagged_attention(k, k, k, offsets, causal=flag)
        else:
            with pytest.raises(TypeError, match="^jagged_attention: causal must be a bool"):
                ik.jagged_attention(k, k, k, offsets, causal=flag)  # type: ignore[arg-type]


def test_the_scale_is_that_of_the_heads_at_hand() -> None:
    """None stands for another number in heads of another size."""
    offsets = torch.tensor([0, 3, 4])
    for channels in (8, 16, 8):
        k = torch.randn(4, 2, channels)
        assert torch.equal(
            ik.jagged_attention(k, k, k, offsets), ik.jagged_attention(k, k, k, offsets, scale=channels**-0.5)
        )
