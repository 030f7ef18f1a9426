"""Values that are extreme or not finite in one place: outputs that do not depend on them keep their bits, and others
their accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_calls import results
from torch import Tensor

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels._launch import splits
from interformer_kernels.testing import Case, offsets_of
from interformer_kernels.testing.budget import Errors, judge, measure

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
Make = Callable[[Case, torch.dtype, str, int], dict[str, Any]]

# ---------------------------------------------------------------- not finite in one place

SIZES = {"heads": 4, "kv_heads": 2, "head_size": 8, "value_size": 8, "tail": 3}
SHORT, LONG = (5, 2, 3, 7), (40, 3, 70, 1)  # one warp for a tile, and blocks of several
CONTAINED = [
    Case("jagged_attention", "short", **SIZES, lengths=SHORT, gate="full", residual=True),
    Case("jagged_attention", "long", **SIZES, lengths=LONG, gate="channel", residual=True),
    Case("jagged_attention", "masks", **SIZES, lengths=LONG, gate="head", options={"window": (4, 0), "num_prefix": 1}),
    Case("jagged_attention", "own queries", **SIZES, lengths=LONG, query_lengths=SHORT, options={"score": "silu"}),
    Case("pma_pooling", "skip", **SIZES, lengths=LONG, queries=3, gate="full", options={"skip_prefix": 2}),
    Case("pma_pooling", "v is k", **SIZES, lengths=SHORT, shared_value=True, options={"score": "gelu"}),
    Case("gated_cross_attention", "dense", **SIZES, lengths=LONG, queries=2, gate="scalar", residual=True),
]


@pytest.mark.parametrize("case", CONTAINED, ids=lambda case: f"{case.op}, {case.name}")
@each_dtype
@pytest.mark.parametrize("split", [1024, 64], ids=["whole", "split"])
def test_a_value_that_is_not_finite_stays_in_its_row_and_head(
    case: Case, dtype: torch.dtype, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tiles, warps and blocks that rows and heads share, and in splits of rows."""
    if split < 1024 and case.op == "jagged_attention":
        pytest.skip("packed queries are never split")
    monkeypatch.setattr(splits, "SPLIT_KV", split)
    inputs = testing.make_inputs(case, dtype)
    planted = [plant for plant in testing.plants(inputs) if plant.value in ("nan", "-inf")]
    assert not testing.check_planted(case, "cuda", inputs, planted[:: 3 if max(case.lengths) < 40 else 5])


def test_scores_of_minus_infinity_alone_have_no_softmax() -> None:
    """Rows of one key, of many keys, and split rows. A query without keys is different: its output is zero."""
    for lengths in ((1, 0, 40), (70, 0, 2100)):
        k = torch.ones(sum(lengths), 1, 8)
        q = torch.zeros(3, 1, 1, 8)
        q[..., 3] = -math.inf
        out, lse = ik.gated_cross_attention(q, k, k, offsets_of(lengths), return_lse=True, backend="cuda")
        assert out[[0, 2]].isnan().all()
        assert lse[[0, 2]].isnan().all()
        assert (out[1] == 0).all()
        assert (lse[1] == -math.inf).all()


# ---------------------------------------------------------------- extreme softmax

DRAWS = 8


def held(case: Case, dtype: torch.dtype, make: Make = testing.make_inputs) -> None:
    """Within the budget of the contract, over a few draws together: gradients of a one-hot softmax are mostly 0, and
    there are never numbers enough.
    """
    total: Errors = {}
    for seed in range(DRAWS):
        errors = measure(lambda made: testing.call(case.op, made, "cuda"), case.op, make(case, dtype, "cpu", seed))
        total = {name: total[name] + sums if total else sums for name, sums in errors.items()}
    assert not [row for row in judge(total) if not row.ok]


ONE = {"heads": 2, "kv_heads": 1, "head_size": 16, "value_size": 16, "tail": 1}
LAYOUTS = [
    Case("jagged_attention", "self", **ONE, lengths=(2, 17, 1)),
    Case("jagged_attention", "gated", **ONE, lengths=(2, 17), gate="full", options={"causal": True}),
    Case("pma_pooling", "v is k", **ONE, lengths=(2, 17, 0, 1), queries=2, shared_value=True),
    Case("gated_cross_attention", "dense", **ONE, lengths=(100, 2), queries=3, gate="head"),
]
each_layout = pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: f"{case.op}, {case.name}")


@each_layout
@pytest.mark.parametrize("scale", [5.0, 20.0, 300.0], ids=["confident", "nearly one-hot", "one-hot"])
@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_confident_softmax(case: Case, scale: float, dtype: torch.dtype) -> None:
    held(replace(case, options={**case.options, "scale": scale}), dtype)


@each_layout
@pytest.mark.parametrize("scale", [-0.5, -20.0, 0.0], ids=["negative", "negative, one-hot", "zero"])
@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_a_scale_that_is_not_positive(case: Case, scale: float, dtype: torch.dtype) -> None:
    """The forward orders products, not scores, in 16 bits: a negative scale turns their order round."""
    held(replace(case, options={**case.options, "scale": scale}), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_confident_softmax_of_split_rows(dtype: torch.dtype) -> None:
    case = Case("pma_pooling", "", **ONE, lengths=(1100, 3), queries=2, shared_value=True, options={"scale": 5.0})
    held(case, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_a_query_of_one_key_has_no_gradient(dtype: torch.dtype) -> None:
    grads = results("jagged_attention", testing.make_inputs(Case("jagged_attention", "", lengths=(1,) * 5), dtype))
    assert not grads["dq"].any()
    assert not grads["dk"].any()


def times(name: str, factor: float) -> Make:
    """A function that makes inputs with one of them multiplied by `factor`."""

    def make(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        inputs = testing.make_inputs(case, dtype, device, seed)
        inputs[name] = (inputs[name].detach() * factor).requires_grad_()
        return inputs

    return make


@each_layout
@pytest.mark.parametrize("size", [1e6, 1e12, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_large_scores(case: Case, size: float, dtype: torch.dtype) -> None:
    """All passes compute the same probabilities, and none is lost to the rounding of a log-sum-exp."""
    held(case, dtype, times("k", size))


def test_large_scores_of_pooled_keys() -> None:
    """17 keys of 5 channels: sums over channels that fill no step."""
    sizes = {"heads": 1, "kv_heads": 1, "head_size": 5, "queries": 1, "tail": 0}
    held(Case("pma_pooling", "", **sizes, lengths=(17,), shared_value=True), torch.float32, times("k", 1e6))


# ---------------------------------------------------------------- largest and smallest numbers


@each_dtype
@pytest.mark.parametrize("lengths", [(4, 1, 3, 100), (1500, 4)], ids=["rows", "split"])
def test_the_mean_of_the_largest_numbers(dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    """The mean lies among its values for any probabilities, up to the rounding of a sum over so many."""
    largest = torch.finfo(dtype).max
    offsets, tokens = offsets_of(lengths), sum(lengths)
    q, k = torch.randn(len(lengths), 1, 2, 8).to(dtype), torch.randn(tokens, 1, 8).to(dtype)
    for value in (largest, -largest):
        v = torch.full((tokens, 1, 8), value, dtype=dtype)
        for keys in (k, torch.zeros_like(k)):
            out = ik.gated_cross_attention(q, keys, v, offsets, backend="cuda")
            packed = ik.jagged_attention(keys, keys, v, offsets, causal=True, backend="cuda")
            rounding = torch.finfo(dtype).eps + tokens * torch.finfo(torch.float32).eps
            for mean in (out, packed):
                torch.testing.assert_close(mean, torch.full_like(mean, value), rtol=rounding, atol=0)


def test_post_scale_comes_before_a_sum_that_would_overflow() -> None:
    """`post_scale` makes probabilities smaller before their sum, and larger after it; in the backward, too."""
    k = torch.ones(8, 1, 4)
    v = torch.full((8, 1, 4), 3e38)
    for size, post_scale in ((1.0, 1 / 8), (1e-38, 1e37)):
        x = (v * size).requires_grad_()
        options = {"score": "relu", "scale": 0.25, "post_scale": post_scale, "backend": "cuda"}
        out = ik.jagged_attention(k, k, x, offsets_of((8,)), **options)
        torch.testing.assert_close(out, x * (8 * post_scale))
        (grad,) = torch.autograd.grad(out, x, v * size)
        torch.testing.assert_close(grad, x * (8 * post_scale))


@pytest.mark.parametrize("post_scale", [2.0**-20, 1 / 2048, 100.0, -0.5, 0.0])
def test_post_scale_of_any_size(post_scale: float) -> None:
    options = {"score": "silu", "post_scale": post_scale}
    for case in LAYOUTS[:3]:
        held(replace(case, options={**case.options, **options}), torch.float16)


def test_weights_of_float16_beyond_its_largest_number() -> None:
    """`act(s)` is 80 000, and `post_scale` brings it back into range."""
    q, v = torch.full((4, 1, 4), 200.0).half(), torch.ones(4, 1, 4).half()
    out = ik.jagged_attention(q, q, v, offsets_of((4,)), scale=0.5, score="relu", post_scale=1e-4, backend="cuda")
    torch.testing.assert_close(out, torch.full_like(out, 32.0))


# ---------------------------------------------------------------- gates and maps


def test_the_ungated_output_is_kept_in_float32() -> None:
    """A is 128 000, beyond float16, while the gated output is finite."""
    k, v = torch.ones(64, 1, 16).half(), torch.full((64, 1, 16), 2000.0).half()
    q, gate = torch.ones(1, 1, 1, 16).half(), torch.ones(1, 1, 1, 16).half().requires_grad_()
    options = {"score": "relu", "scale": 1 / 16, "gate_form": "self", "gate_activation": "sigmoid"}
    ik.gated_cross_attention(q, k, v, offsets_of((64,)), gate=gate, **options, backend="cuda").sum().backward()
    assert gate.grad is not None
    assert not gate.grad.any()


def gates_of(size: float) -> Make:
    """A function that makes inputs with gates of about this size, of either sign."""

    def make(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        inputs = testing.make_inputs(case, dtype, device, seed)
        drawn = inputs["gate"].detach()
        inputs["gate"] = (drawn.sign() * size * (1 + drawn.abs() / 16)).requires_grad_()
        return inputs

    return make


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "silu"])
@pytest.mark.parametrize("form", ["multiply", "self"])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 5.0, 20.0, 50.0])
def test_gates_near_zero_and_saturated(activation: str, form: str, size: float) -> None:
    options = {"gate_form": form, "gate_activation": activation}
    case = Case("jagged_attention", "", **ONE, lengths=(9, 20), gate="full", options=options)
    held(case, torch.float32, gates_of(size))


@pytest.mark.parametrize("gate", ["head", "channel", "scalar"])
@pytest.mark.parametrize("form", ["multiply", "self"])
@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_sums_of_a_gates_gradient_show_no_rounding_of_their_terms(gate: str, form: str, dtype: torch.dtype) -> None:
    case = Case("jagged_attention", "", **ONE, lengths=(60, 40), gate=gate, options={"gate_form": form})
    held(case, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("size", [1e-6, 3.0, 30.0, 1e4])
def test_activations_of_any_size(activation: str, size: float) -> None:
    ffn = Case("personalized_ffn", "", lengths=(9, 0, 20), head_size=16, value_size=24)
    held(replace(ffn, options={"activation": activation}), torch.float32, times("x", size))
    options = {"score": activation, "scale": size}
    held(replace(LAYOUTS[0], options=options), torch.float32)


# ---------------------------------------------------------------- indices


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_indices_of_any_stride(dtype: torch.dtype) -> None:
    """Between entries lie numbers that would be wrong anywhere."""

    def spread(x: Tensor) -> Tensor:
        memory = torch.full((len(x), 3), 10**6, dtype=dtype)
        memory[:, 1] = x
        return memory[:, 1]

    sizes = {**ONE, "lengths": (5, 0, 40), "query_lengths": (3, 20, 2), "index_dtype": dtype}
    for case in (
        Case("jagged_attention", "", **sizes, rope=4, positions=True),
        Case("gated_cross_attention", "", **sizes),
        Case("pma_pooling", "", **{**sizes, "query_lengths": None}),
        Case("personalized_ffn", "", **{**sizes, "query_lengths": None}),
        Case("apply_rotary", "", **{**sizes, "query_lengths": None}, rope=4, positions=True),
    ):
        inputs = testing.make_inputs(case, torch.float32)
        given = dict(inputs)
        for name in ("offsets", "kv_offsets", "q_offsets", "positions"):
            if inputs.get(name) is not None:
                given[name] = spread(inputs[name])
        if "rope_positions" in inputs:
            given["rope_positions"] = tuple(map(spread, inputs["rope_positions"]))
        actual = results(case.op, given)
        for quantity, x in results(case.op, inputs).items():
            assert torch.equal(actual[quantity], x), (case.op, quantity)
