"""The CPU kernels on values that are extreme or not finite in one place, compared place by place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cpu_calls import all_ops, broadcast_shapes, differing, layouts, name_of, replaced, results, truth
from torch import Tensor

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels.testing import Case, make_inputs, offsets_of

pytest.importorskip("interformer_kernels._C", exc_type=ImportError)

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
SCORES = ("softmax", "identity", "relu", "silu", "gelu")
LENGTHS = (5, 70, 0, 1, 3)
SIZES: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_size": 8, "value_size": 8}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# ---------------------------------------------------------------- attn_out is kept unrounded


@pytest.mark.parametrize("form", ["self", "multiply"])
@pytest.mark.parametrize("score", SCORES[1:])
def test_an_attention_output_beyond_float16_reaches_the_backward(score: str, form: str) -> None:
    """attn_out is 128 000 and the output finite: the gradients of the gate and the inputs are finite, too."""
    n = 64
    inputs = {
        "q": torch.ones(1, 1, 1, 16),
        "k": torch.ones(n, 1, 16),
        "v": torch.full((n, 1, 16), 2000.0),
        "gate": torch.full((1, 1, 1, 16), -9.0 if form == "multiply" else 1.0),
        "grad_out": torch.ones(1, 1, 1, 16),
    }
    inputs = {name: x.half().requires_grad_(name != "grad_out") for name, x in inputs.items()}
    options = {"score": score, "scale": 0.0625, "gate_form": form, "gate_activation": "sigmoid"}
    arguments = {**inputs, **options, "kv_offsets": offsets_of((n,))}
    actual = results("gated_cross_attention", arguments)
    exact = truth("gated_cross_attention", testing.cast_inputs(arguments, torch.float32))
    for name, x in actual.items():
        expected = exact[name].half()
        assert x.isfinite().all(), name
        torch.testing.assert_close(x, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", ["multiply", "self"])
@pytest.mark.parametrize("case", layouts((150, 0, 40, 1, 90), **SIZES), ids=name_of)
def test_gradients_of_broadcast_gates_are_sums_of_unrounded_terms(case: Case, form: str, dtype: torch.dtype) -> None:
    """The error is that of the reference in float32 on the same numbers, and one rounding of the output."""
    inputs = {**make_inputs(case, dtype), "gate_form": form}
    for shape in broadcast_shapes(tuple(inputs["grad_out"].shape)):
        if math.prod(shape) * 16 > inputs["grad_out"].numel():
            continue  # too few terms in a sum for the rounding of each to show
        gated = {**inputs, "gate": torch.randn(shape).to(dtype).requires_grad_()}
        actual = results(case.op, gated)["dgate"]
        exact = truth(case.op, testing.cast_inputs(gated, torch.float64))["dgate"]
        rounded = exact.to(dtype)
        unit = torch.finfo(dtype).eps
        # avx512_bf16 rounds operands of products, so attn_out may err as much as a sum of rounded probabilities.
        assert rms(actual - exact) <= 2 * rms(rounded - exact) + unit * rms(exact), (shape, form)


# ---------------------------------------------------------------- means of large values


@pytest.mark.parametrize("keys", [1, 2, 3, 4, 5, 17, 64, 100, 1025, 5000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_mean_of_the_largest_numbers_is_finite(dtype: torch.dtype, keys: int) -> None:
    largest = torch.finfo(dtype).max
    unit = 4 * torch.finfo(dtype).eps
    for queries in (1, 20):
        k, q = torch.randn(keys, 2, 8).to(dtype), torch.randn(1, queries, 4, 8).to(dtype)
        for scale in (0.0, 0.3, 20.0):
            v = torch.full((keys, 2, 8), largest, dtype=dtype)
            v[:, 1] = -largest
            out, lse = ik.gated_cross_attention(
                q, k, v, offsets_of((keys,)), scale=scale, return_lse=True, backend="cpu"
            )
            _, expected = ik.gated_cross_attention(
                q, k, v, offsets_of((keys,)), scale=scale, return_lse=True, backend="reference"
            )
            assert out.isfinite().all()
            mean = v[0].repeat_interleave(2, 0).expand_as(out)
            assert ((out.double() / 2 - mean.double() / 2).abs() <= unit * largest).all()
            # The reference rounds 16-bit scores before it sums them.
            close = (
                {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps} if dtype in HALVES else {}
            )
            torch.testing.assert_close(lse, expected, **close)


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (300, 2)}, {"window": (5, 0), "num_prefix": 9}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_means_of_large_values_under_masks(dtype: torch.dtype, mask: dict[str, Any]) -> None:
    """Means and gradients: those of v are probabilities, the others are finite where dP is."""
    large = 3e38 if dtype == torch.float32 else 1.7e308
    n = 900
    q, k = (torch.randn(n, 2, 8, dtype=dtype) for _ in "qk")
    v = large * torch.rand(n, 2, 8, dtype=dtype)
    grad = torch.randn(n, 2, 8, dtype=dtype) / 2**20
    inputs = {"q": q, "k": k, "v": v, "offsets": offsets_of((n,)), **mask}
    inputs = {name: x.requires_grad_() if name in "qkv" else x for name, x in inputs.items()}
    small = {**inputs, "v": (v.detach() / 2**40).requires_grad_()}
    actual, expected = (results("jagged_attention", {**arguments, "grad_out": grad}) for arguments in (inputs, small))
    for name, power in (("out", 40), ("lse", 0), ("dv", 0), ("dq", 40), ("dk", 40)):
        assert actual[name].isfinite().all(), name
        assert torch.equal(actual[name], expected[name] * 2.0**power), name  # powers of two change no bit


@pytest.mark.parametrize("score", SCORES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_post_scale_comes_before_the_sum(dtype: torch.dtype, score: str) -> None:
    large = 1e38 if dtype == torch.float32 else 5e307
    n = 40
    k, v, q = torch.ones(n, 1, 4, dtype=dtype), torch.full((n, 1, 8), large, dtype=dtype), torch.ones(1, 3, 1, 4)
    arguments = {"q": q.to(dtype), "k": k, "v": v, "kv_offsets": offsets_of((n,)), "score": score, "post_scale": 1 / n}
    arguments["grad_out"] = torch.full((1, 3, 1, 8), 0.125, dtype=dtype)
    arguments = {name: x.requires_grad_() if name in "qkv" else x for name, x in arguments.items()}
    actual = results("gated_cross_attention", arguments)
    small = {**arguments, "v": (v.detach() * 2.0**-40).requires_grad_()}
    expected = results("gated_cross_attention", small)
    for name, power in (("out", 40), ("dv", 0), ("dq", 40), ("dk", 40)):
        assert actual[name].isfinite().all(), name
        assert torch.equal(actual[name], expected[name] * 2.0**power), name


# ---------------------------------------------------------------- values that are not finite stay in their place


def hard_cases() -> list[Case]:
    epilogue = {"gate": "full", "residual": True}
    cases = layouts(LENGTHS, **SIZES, **epilogue)
    cases += layouts((300, 0, 2), **{**SIZES, "head_size": 9, "value_size": 11})[:2]
    masks = ({"causal": True}, {"window": (3, 1), "num_prefix": 2}, {"score": "relu", "post_scale": 0.5})
    cases += [Case("jagged_attention", str(m), lengths=LENGTHS, **SIZES, **epilogue, options=m) for m in masks]
    cases += [Case("jagged_attention", "rope", lengths=LENGTHS, **SIZES, rope=6)]
    inside = {"gate_form": "self", "score": "silu"}
    cases += [Case("pma_pooling", "self gate", lengths=LENGTHS, **SIZES, **epilogue, options=inside)]
    return cases


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", hard_cases(), ids=name_of)
def test_neighbours_keep_their_bits(case: Case, dtype: torch.dtype) -> None:
    """In rows of several blocks and vectors of keys, with odd sizes and all kinds of queries."""
    inputs = make_inputs(case, dtype)
    plants = [plant for plant in testing.plants(inputs) if plant.value in ("nan", "inf", "-inf")]
    assert not testing.check_planted(case, "cpu", inputs, plants)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_neighbours_keep_their_bits_under_apply_rotary(dtype: torch.dtype) -> None:
    case = Case("apply_rotary", "", lengths=LENGTHS, rope=6, head_size=9)
    inputs = make_inputs(case, dtype)
    clean = results(case.op, inputs)
    for name, quantity in (("x", "out"), ("grad_out", "dx")):
        for channel, pair in ((1, [1, 4]), (5, [2, 5]), (7, [7])):
            actual = results(case.op, testing.hard.planted(inputs, testing.hard.Plant(name, (11, 2, channel), "nan")))
            for result_name, x in actual.items():
                wrong = (x != clean[result_name]) & ~(x.isnan() & clean[result_name].isnan())
                if result_name == quantity:
                    wrong[11, 2, pair] = False
                assert not wrong.any(), (name, channel, result_name)


# ---------------------------------------------------------------- rows of many shards


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (40, 0)},
        {"window": (7, 30), "num_prefix": 3},
        {"window": (0, 0), "num_prefix": 1300},
        {"score": "silu", "causal": True},
    ],
    ids=str,
)
def test_shards_of_a_row_have_the_bits_of_the_whole(options: dict[str, Any], dtype: torch.dtype) -> None:
    """One long row, two beside a short one, and queries that differ from the keys."""
    sizes = {"heads": 2, "kv_heads": 1, "head_size": 16, "value_size": 10, "rope": 8, "options": options}
    cases = [Case("jagged_attention", "one", lengths=(1400,), **sizes)]
    cases += [Case("jagged_attention", "two", lengths=(900, 3, 1100), **sizes)]
    cases += [Case("jagged_attention", "cross", lengths=(60, 700), query_lengths=(1300, 900), positions=True, **sizes)]
    before = torch.get_num_threads()
    try:
        for case in cases:
            inputs = make_inputs(case, dtype)
            by_threads = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                by_threads.append(results(case.op, inputs))
            for of_threads in by_threads[1:]:
                assert not differing(by_threads[0], of_threads), case.name
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{"window": (40, 0)}, {"window": (7, 30), "num_prefix": 3}], ids=str)
def test_a_long_row_under_a_window_is_right(options: dict[str, Any]) -> None:
    case = Case("jagged_attention", "", lengths=(2100,), heads=1, kv_heads=1, options=options)
    for dtype in (torch.float32, torch.bfloat16):
        for row in testing.compare(case, "cpu", dtype):
            assert row.ok, row


# ---------------------------------------------------------------- empty inputs


def test_sizes_of_zero() -> None:
    """No rows, no tokens, no queries, no heads of them, no channels of a feed-forward: zeros, or nothing."""
    offsets = {0: torch.tensor([0]), 2: torch.tensor([0, 0, 3])}
    for rows, tokens in ((0, 0), (0, 4), (2, 4)):
        for inputs_size, outputs in ((0, 0), (0, 5), (5, 0)):
            arguments: dict[str, Any] = {
                "x": torch.randn(tokens, inputs_size),
                "weight": torch.randn(rows, inputs_size, outputs),
                "bias": torch.randn(rows, outputs),
            }
            arguments = {name: x.requires_grad_() for name, x in arguments.items()}
            arguments.update(offsets=offsets[rows], grad_out=torch.randn(tokens, outputs))
            compare_with_truth("personalized_ffn", arguments)
    for queries, heads in ((0, 2), (3, 2)):
        for rows, tokens in ((0, 0), (2, 4)):
            kv = {name: torch.randn(tokens, 2, 4).requires_grad_() for name in "kv"}
            gate = torch.randn(heads, 1).requires_grad_()
            seeds, q = torch.randn(queries, heads, 4).requires_grad_(), torch.randn(rows, queries, heads, 4)
            out = torch.randn(rows, queries, heads, 4)
            compare_with_truth("pma_pooling", {**kv, "seeds": seeds, "offsets": offsets[rows], "grad_out": out})
            dense = {**kv, "q": q.requires_grad_(), "kv_offsets": offsets[rows], "grad_out": out}
            compare_with_truth("gated_cross_attention", dense)
            compare_with_truth("gated_cross_attention", {**dense, "gate": gate})
    for case in all_ops((), **SIZES, tail=0) + all_ops((0, 0), **SIZES, tail=0):
        inputs = make_inputs(case, torch.float32)
        compare_with_truth(case.op, inputs)
        compare_with_truth(case.op, replaced(inputs, lambda name, x: x.clone()))


def compare_with_truth(op: str, inputs: dict[str, Any]) -> None:
    actual, expected = results(op, inputs), truth(op, inputs)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], msg=lambda text, name=name: f"{op} {name}: {text}")


# ---------------------------------------------------------------- softmax over several blocks of keys


def plant_scores(k: Tensor, kind: str, places: Tensor) -> None:
    """Makes scores of the first channel's queries infinite or NaN at two keys, or -inf at all of them."""
    infinite = torch.zeros_like(k[0])
    infinite[0] = math.inf
    if kind in {"inf", "inf and nan"}:
        k[places[0]] = infinite
    if kind in {"nan", "inf and nan"}:
        k[places[1], 0] = math.nan
    if kind == "-inf":
        k[:] = -infinite


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["none", "inf", "nan", "inf and nan", "-inf"])
def test_scores_that_are_not_finite_in_any_block_of_keys(kind: str, dtype: torch.dtype) -> None:
    """The blocks of the forward's online softmax give the maximum, the sum and NaNs of the whole row."""
    n = 300
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    masks: tuple[dict[str, Any], ...] = (
        {},
        {"causal": True},
        {"window": (20, 5)},
        {"window": (50, 0), "num_prefix": 3},
    )
    for seed, mask in enumerate(masks):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(n, 2, 16, generator=generator).to(dtype) for _ in range(3))
        q[:, :, 0] = q[:, :, 0].abs() + 0.5
        plant_scores(k[:, 0], kind, torch.randint(n, (2,), generator=generator))
        arguments = {"offsets": offsets_of((n,)), "return_lse": True, **mask}
        out, lse = ik.jagged_attention(q, k, v, backend="cpu", **arguments)
        wide = ik.jagged_attention(q.double(), k.double(), v.double(), backend="reference", **arguments)
        for actual, expected in zip((out, lse), wide, strict=True):
            torch.testing.assert_close(
                actual.double(), expected, rtol=tolerance, atol=2 * tolerance, equal_nan=True, msg=f"{mask}"
            )
