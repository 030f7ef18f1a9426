"""The checks of the native module's functions, and their messages."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from interformer_kernels._calls import (
    AttentionCall,
    AttentionGradients,
    AttentionOutputs,
    FfnCall,
    FfnGradients,
    FfnOutputs,
    FoldedCall,
    FoldedOutputs,
    RotaryCall,
    RotaryOutputs,
)

_C = pytest.importorskip("interformer_kernels._C", exc_type=ImportError)

FLOATS = "float32, float64, bfloat16 or float16"
B, M, H, HK, D, DV, T = 2, 3, 4, 2, 5, 6, 7
COUNT = len(AttentionCall._fields)


# One valid call of each function: arguments by name, in the order in which they are passed.
def attention_arguments() -> dict[str, Any]:
    """The arguments that both directions share, in any order, for a call with shared queries."""
    return {
        "layout": "shared",
        "q": torch.zeros(M, H, D),
        "k": torch.zeros(T, HK, D),
        "v": torch.zeros(T, HK, DV),
        "q_offsets": None,
        "kv_offsets": torch.tensor([0, 3, 7]),
        "gate": torch.zeros(B, M, H, DV),
        "scale": 1.0,
        "score": "softmax",
        "post_scale": 1.0,
        "gate_form": "multiply",
        "gate_activation": "sigmoid",
    }


def called(function: Callable[..., None], call: Any, written: Any, changed: dict[str, Any]) -> None:
    """Call `function` with both tuples and a number of threads; any entry of them may be changed."""
    changed = {"threads": 1, **changed}
    threads = changed.pop("threads")
    others = {name: changed.pop(name) for name in written._fields if name in changed}
    function(call._replace(**changed), written._replace(**others), threads)


def forward(**changed: Any) -> None:
    row = torch.zeros(B, M, H, DV)
    outputs = AttentionOutputs(row, row.clone(), torch.zeros(B, M, H), row.clone())
    called(_C.attention_forward, AttentionCall(**attention_arguments()), outputs, changed)


def backward(**changed: Any) -> None:
    row, shared = torch.zeros(B, M, H, DV), attention_arguments()
    written = (shared[name].clone() for name in ("q", "k", "v"))
    gradients = AttentionGradients(row, row, row[..., 0], *written, torch.zeros(B, 1, H, DV))
    called(_C.attention_backward, AttentionCall(**shared), gradients, changed)


PACKED = {
    "layout": "packed", "q": torch.zeros(T, H, D), "gate": torch.zeros(T, H, DV), "residual": torch.zeros(T, H, DV),
    "out": torch.zeros(T, H, DV), "lse": torch.zeros(T, H), "attn_out": torch.zeros(T, H, DV),
}  # fmt: skip
DENSE = {"layout": "dense", "q": torch.zeros(B, M, H, D)}
ROPE = {**PACKED, "cos": torch.zeros(9, 2), "sin": torch.zeros(9, 2)}


def ffn_arguments() -> dict[str, Any]:
    return {
        "x": torch.zeros(T, D),
        "weight": torch.zeros(B, D, DV),
        "offsets": torch.tensor([0, 3, 7]),
        "bias": torch.zeros(B, DV),
        "activation": "relu",
    }


def ffn_forward(**changed: Any) -> None:
    outputs = FfnOutputs(torch.zeros(T, DV), torch.zeros(T, DV))
    called(_C.personalized_ffn_forward, FfnCall(**ffn_arguments()), outputs, changed)


def ffn_backward(**changed: Any) -> None:
    shared = ffn_arguments()
    gradients = FfnGradients(torch.zeros(T, DV), *(shared[name].clone() for name in ("x", "weight", "bias")))
    called(_C.personalized_ffn_backward, FfnCall(**shared), gradients, changed)


def folded(**changed: Any) -> None:
    seeds, weight, bias, x = torch.zeros(M, H, D), torch.zeros(H * D, DV), torch.zeros(H * D), torch.zeros(T, DV)
    call = FoldedCall(seeds, weight, weight, bias, x, torch.tensor([0, 3, 7]), 1.0)
    outputs = FoldedOutputs(torch.zeros(B, M, H, D), torch.zeros(B, M, H, DV))
    called(_C.folded_pooling_forward, call, outputs, changed)


def rotary(**changed: Any) -> None:
    x = torch.zeros(T, H, D)
    call = RotaryCall(x, torch.tensor([0, 3, 7]), torch.zeros(9, 2), torch.zeros(9, 2), None, False)
    called(_C.apply_rotary, call, RotaryOutputs(x.clone(), False), changed)


# ---------------------------------------------------------------- refused arguments


def wrong(changed: object) -> str | None:
    """The name of a case: the argument that it changes last."""
    return list(changed)[-1] if isinstance(changed, dict) else None


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"k": torch.zeros(7, 2, 5, dtype=torch.int64)}, TypeError, f"k must be {FLOATS}, found int64 [7, 2, 5] on"),
        ({"k": torch.zeros(7, 2, 5, dtype=torch.bool)}, TypeError, f"k must be {FLOATS}, found bool [7, 2, 5]"),
        ({"k": torch.zeros(7, 2, 5, dtype=torch.complex64)}, TypeError, f"k must be {FLOATS}, found complex64"),
        ({"v": torch.zeros(7, 2, 6).half()}, TypeError, "v must be float32, found float16 [7, 2, 6]"),
        ({"q": torch.zeros(3, 4, 5).double()}, TypeError, "q must be float32, found float64 [3, 4, 5]"),
        ({"lse": torch.zeros(2, 3, 4).half()}, TypeError, "lse must be float32, found float16"),
        ({"kv_offsets": torch.zeros(3)}, TypeError, "kv_offsets must be int32 or int64, found float32 [3] on the CPU"),
        ({"kv_offsets": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "kv_offsets must be a vector, found int64"),
        ({"kv_offsets": torch.zeros(0).int()}, ValueError, "kv_offsets must be [B+1] with at least one entry"),
        ({"k": torch.zeros(7, 10)}, ValueError, "k must be float32 [Tk, Hk, D], found float32 [7, 10] on the CPU"),
        ({"k": torch.zeros((1,) * 9)}, ValueError, "k must be float32 [Tk, Hk, D], found float32 [9 axes]"),
        ({"k": torch.zeros(7, 2, 10)[..., ::2]}, ValueError, "k must be contiguous along its last axis"),
        ({"v": torch.zeros(7, 2, 12)[..., ::2]}, ValueError, "v must be contiguous along its last axis"),
        ({"v": torch.zeros(6, 2, 6)}, ValueError, "v must be float32 [Tk = 7, Hk = 2, Dv], found float32 [6, 2, 6]"),
        ({"v": torch.zeros(7, 2, 0)}, ValueError, "k must be of at least one channel"),
        ({"q": torch.zeros(3, 4, 6)}, ValueError, "q must be float32 [M, H, D = 5], found float32 [3, 4, 6]"),
        ({"q": torch.zeros(3, 3, 5)}, ValueError, "q must be of a number of heads that k's 2 divides"),
        ({"q": torch.zeros(3, 0, 5)}, ValueError, "q must be of a number of heads that k's 2 divides"),
        ({"gate": torch.zeros(2, 3, 4, 1)}, ValueError, "gate must be float32 [B = 2, N = 3, H = 4, Dv = 6]"),
        ({"residual": torch.zeros(3, 4, 6)}, ValueError, "residual must be float32 [B = 2, N = 3, H = 4, Dv = 6]"),
        ({"attn_out": torch.zeros(2, 3, 4, 5)}, ValueError, "attn_out must be float32 [B = 2, N = 3, H = 4, Dv = 6]"),
        ({"out": torch.zeros(2, 3, 4, 5)}, ValueError, "out must be float32 [B = 2, N = 3, H = 4, Dv = 6]"),
        ({"out": torch.zeros(2, 3, 4, 12)[..., ::2]}, ValueError, "out must be contiguous, found a stride of 2"),
        ({"score": "relu"}, ValueError, "lse must be None without softmax"),
        ({"skip_prefix": -1}, ValueError, "skip_prefix must be at least 0, found -1"),
        ({"window_left": -2}, ValueError, "window_left must be at least -1, found -2"),
        ({"window_right": -2}, ValueError, "window_right must be at least -1, found -2"),
        ({"num_prefix": -1}, ValueError, "num_prefix must be at least 0, found -1"),
        ({**DENSE, "q": torch.zeros(3, 3, 4, 5)}, ValueError, "q must be float32 [B = 2, N, H, D = 5], found"),
        ({**PACKED, "q": torch.zeros(2, 3, 4, 5)}, ValueError, "q must be float32 [Tq, H, D = 5], found"),
        ({**PACKED, "q": torch.zeros(6, 4, 5)}, ValueError, "q must be of k's tokens, or with q_offsets, found"),
        ({**PACKED, "q_offsets": torch.tensor([0, 7])}, ValueError, "q_offsets must be [B+1], found int64 [2]"),
        ({**PACKED, "q_offsets": torch.zeros(3)}, TypeError, "q_offsets must be int32 or int64, found float32"),
        ({**PACKED, "lse": torch.zeros(2, 3, 4)}, ValueError, "lse must be float32 [Tq = 7, H = 4], found"),
        ({**PACKED, "gate": torch.zeros(7, 4, 5)}, ValueError, "gate must be float32 [Tq = 7, H = 4, Dv = 6], found"),
        ({**ROPE, "sin": None}, ValueError, "sin must be given with cos, found None"),
        ({**ROPE, "sin": torch.zeros(8, 2)}, ValueError, "sin must be float32 [P = 9, R/2 = 2], found float32 [8, 2]"),
        ({**ROPE, "cos": torch.zeros(9, 2).double()}, TypeError, "cos must be float32, found float64 [9, 2]"),
        ({**ROPE, "cos": torch.zeros(9, 4)[:, ::2]}, ValueError, "cos must be contiguous along its last axis"),
        ({**ROPE, "sin": torch.zeros(9, 3), "cos": torch.zeros(9, 3)}, ValueError, "cos must be [P, R/2] with P >= 1"),
        ({**ROPE, "sin": torch.zeros(0, 2), "cos": torch.zeros(0, 2)}, ValueError, "cos must be [P, R/2] with P >= 1"),
        ({**ROPE, "positions_q": torch.zeros(7)}, TypeError, "positions_q must be int32 or int64, found float32"),
        ({**ROPE, "positions_k": torch.zeros(6).int()}, ValueError, "positions_k must be one for each token, found"),
        ({"sin": torch.zeros(9, 2), "cos": torch.zeros(9, 2)}, ValueError, "cos must be None unless queries are"),
    ],
    ids=wrong,
)  # fmt: skip
def test_wrong_dtype_rank_or_shape(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape("attention_forward: " + message)):
        forward(**changed)


@pytest.mark.parametrize(
    ("call", "changed", "message"),
    [
        (forward, {"layout": "ragged"}, "layout must be packed, dense or shared, found ragged"),
        (forward, {"score": "max"}, "activation must be identity, relu, silu or gelu, found max"),
        (forward, {"gate_form": "add"}, "gate_form must be multiply or self, found add"),
        (forward, {"gate_activation": "relu"}, "gate_activation must be sigmoid, tanh, silu or identity, found relu"),
        (ffn_forward, {"activation": "tanh"}, "activation must be identity, relu, silu or gelu, found tanh"),
    ],
    ids=wrong,
)
def test_unknown_names(call: Callable[..., None], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        call(**changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad_v": None}, "grad_v must be given, found None"),
        ({"gate": None}, "attn_out must be None, found float32 [2, 3, 4, 6]"),
        ({"attn_out": None}, "attn_out must be given, found None"),
        ({"grad_gate": None}, "grad_gate must be given, found None"),
        ({"gate": None, "attn_out": None}, "grad_gate must be None, found float32 [2, 1, 4, 6]"),
        ({"grad_gate": torch.zeros(2, 2, 4, 6)}, "grad_gate must be of size 1 or the output's on every axis"),
        ({"grad_gate": torch.zeros(4, 6)}, "grad_gate must be float32 [B or 1, N or 1, H or 1, Dv or 1], found"),
        ({"grad_q": torch.zeros(3, 4, 6)}, "grad_q must be float32 [M = 3, H = 4, D = 5], found float32 [3, 4, 6]"),
        ({"grad_k": torch.zeros(6, 2, 5)}, "grad_k must be of the shape of k, [7, 2, 5], found float32 [6, 2, 5]"),
        ({"grad_v": torch.zeros(7, 2, 5)}, "grad_v must be of the shape of v, [7, 2, 6], found float32 [7, 2, 5]"),
        ({"grad_k": torch.zeros(7, 2, 10)[..., ::2]}, "grad_k must be contiguous, found a stride of 2"),
        ({"grad_out": torch.zeros(2, 3, 4, 5)}, "grad_out must be float32 [B = 2, N = 3, H = 4, Dv = 6], found"),
        ({"grad_lse": torch.zeros(2, 3, 1)}, "grad_lse must be float32 [B = 2, N = 3, H = 4], found float32 [2, 3, 1]"),
        ({"score": "relu"}, "grad_lse must be None without softmax, found float32 [2, 3, 4]"),
    ],
    ids=wrong,
)  # fmt: skip
def test_wrong_gradients(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape("attention_backward: " + message)):
        backward(**changed)


def test_gradients_without_values_of_their_own() -> None:
    row = torch.zeros(B, M, H, D)
    same = {"v": None, "gate": row, "grad_out": row, "attn_out": row, "grad_gate": row.clone()}
    backward(**same, grad_v=None)
    with pytest.raises(ValueError, match=re.escape("attention_backward: grad_v must be None, found float32 [7, 2, 6]")):
        backward(**same)


@pytest.mark.parametrize(
    ("call", "changed", "error", "message"),
    [
        (ffn_forward, {"x": torch.zeros(7, 5).int()}, TypeError, f"forward: x must be {FLOATS}, found int32 [7, 5]"),
        (ffn_forward, {"x": torch.zeros(7, 5, 1)}, ValueError, "forward: x must be float32 [T, E], found"),
        (ffn_forward, {"weight": torch.zeros(3, 5, 6)}, ValueError, "forward: weight must be float32 [B = 2, E = 5"),
        (ffn_forward, {"bias": torch.zeros(2, 5)}, ValueError, "forward: bias must be float32 [B = 2, F = 6], found"),
        (ffn_forward, {"offsets": torch.zeros(0).int()}, ValueError, "forward: offsets must be [B+1] with at least"),
        (ffn_forward, {"residual": torch.zeros(7, 6).half()}, TypeError, "forward: residual must be float32, found"),
        (ffn_forward, {"out": torch.zeros(6, 7).T}, ValueError, "forward: out must be contiguous, found a stride of"),
        (ffn_backward, {"grad_out": torch.zeros(7, 5)}, ValueError, "backward: grad_out must be float32 [T = 7, F"),
        (ffn_backward, {"grad_bias": None}, ValueError, "backward: grad_bias must be given, found None"),
        (ffn_backward, {"bias": None}, ValueError, "backward: grad_bias must be None, found float32 [2, 6]"),
        (ffn_backward, {"grad_weight": torch.zeros(2, 6, 5)}, ValueError, "backward: grad_weight must be of the shape"),
    ],
    ids=wrong,
)  # fmt: skip
def test_wrong_feed_forward(
    call: Callable[..., None], changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^" + re.escape("personalized_ffn_" + message)):
        call(**changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(7, 4, 5).int()}, TypeError, f"x must be {FLOATS}, found int32 [7, 4, 5]"),
        ({"x": torch.zeros(7, 20)}, ValueError, "x must be float32 [T, H, D], found float32 [7, 20]"),
        ({"out": torch.zeros(7, 4, 6)}, ValueError, "out must be of the shape of x, [7, 4, 5], found float32"),
        ({"offsets": torch.zeros(3)}, TypeError, "offsets must be int32 or int64, found float32 [3]"),
        ({"offsets": torch.zeros(0).int()}, ValueError, "offsets must be [B+1] with at least one entry, found"),
        ({"positions": torch.zeros(6).int()}, ValueError, "positions must be one for each token, found int32 [6]"),
        ({"sin": torch.zeros(9, 1)}, ValueError, "sin must be float32 [P = 9, R/2 = 2], found float32 [9, 1]"),
    ],
    ids=wrong,
)
def test_wrong_rotary(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape("apply_rotary: " + message)):
        rotary(**changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(7, 6).int()}, TypeError, f"x must be {FLOATS}, found int32 [7, 6]"),
        ({"x": torch.zeros(7, 6, 1)}, ValueError, "x must be float32 [T, E], found float32 [7, 6, 1]"),
        ({"x": torch.zeros(7, 0)}, ValueError, "x must be of at least one channel, found float32 [7, 0]"),
        ({"seeds": torch.zeros(3, 20)}, ValueError, "seeds must be float32 [M, H, D], found float32 [3, 20]"),
        ({"seeds": torch.zeros(3, 4, 5).half()}, TypeError, "seeds must be float32, found float16 [3, 4, 5]"),
        ({"key_weight": torch.zeros(6, 20)}, ValueError, "key_weight must be float32 [H D = 20, E = 6], found"),
        ({"value_weight": torch.zeros(20, 7)}, ValueError, "value_weight must be float32 [H D = 20, E = 6], found"),
        ({"value_bias": torch.zeros(5)}, ValueError, "value_bias must be float32 [H D = 20], found float32 [5]"),
        ({"offsets": torch.zeros(3)}, TypeError, "offsets must be int32 or int64, found float32 [3]"),
        ({"offsets": torch.zeros(0).int()}, ValueError, "offsets must be [B+1] with at least one entry, found"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, found inf"),
        ({"out": torch.zeros(2, 3, 4, 6)}, ValueError, "out must be float32 [B = 2, M = 3, H = 4, D = 5], found"),
        ({"out": torch.zeros(2, 4, 3, 5).transpose(1, 2)}, ValueError, "out must be contiguous, found a stride of"),
        ({"pooled": torch.zeros(2, 3, 4, 5)}, ValueError, "pooled must be float32 [B = 2, M = 3, H = 4, E = 6], found"),
    ],
    ids=wrong,
)  # fmt: skip
def test_wrong_folded(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape("folded_pooling_forward: " + message)):
        folded(**changed)


def without_memory(x: torch.Tensor) -> torch.Tensor:
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("name", ["k", "v", "gate", "kv_offsets", "residual", "out", "lse"])
def test_memory_that_was_given_back(name: str) -> None:
    changed = {name: without_memory(torch.zeros(3))}
    message = f"attention_forward: {name} must be a dense tensor in memory, found Tensor without memory"
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        forward(**changed)
    if name in AttentionCall._fields:
        with pytest.raises(TypeError, match="^" + re.escape(message.replace("forward", "backward"))):
            backward(**changed)
    forward()  # the error leaves no state behind


def test_empty_tensors_are_not_read() -> None:
    """Tensors without elements have no memory, and need none."""
    none = {"k": torch.zeros(0, HK, D), "v": torch.zeros(0, HK, DV), "kv_offsets": torch.zeros(3, dtype=torch.int32)}
    assert none["k"].data_ptr() == 0
    forward(**none)
    forward(**none | {"v": torch.zeros(0, HK, 2 * DV)[..., ::2]})
    backward(**none, grad_k=torch.zeros(0, HK, D), grad_v=torch.zeros(0, HK, DV))


def test_valid_calls_pass() -> None:
    """The calls that the tests above change are valid."""
    forward()
    bare = {"v": None, "gate": None, "residual": None, "lse": None, "attn_out": None}
    forward(**bare, out=torch.zeros(B, M, H, D))
    forward(**DENSE)
    forward(**ROPE)
    backward()
    ffn_forward()
    ffn_forward(bias=None, residual=None)
    ffn_backward()
    ffn_backward(bias=None, grad_bias=None)
    folded()
    folded(value_bias=None, pooled=None)
    rotary()


def test_arguments_go_by_position_only() -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.apply_rotary(call=())
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.attention_forward(AttentionCall(**attention_arguments()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda call: 3, "call must be a tuple, found int"),
        (lambda call: list(call), "call must be a tuple, found list"),
        (lambda call: call[:3], "call must be a tuple that goes on with v, found a tuple of 3"),
        (lambda call: (), "call must be a tuple that goes on with layout, found a tuple of 0"),
        (lambda call: (*call, 1), f"call must be a tuple of {COUNT}, found a tuple of {COUNT + 1}"),
        (lambda call: call._replace(layout=1), "layout must be a str, found int"),
        (lambda call: call._replace(score="\ud800"), "score must be a str, found str"),
        (lambda call: call._replace(q=None), "q must be a torch.Tensor, found NoneType"),
        (lambda call: call._replace(v=0), "v must be a torch.Tensor, found int"),
        (lambda call: call._replace(scale=1), "scale must be a float, found int"),
        (lambda call: call._replace(causal=0), "causal must be a bool, found int"),
        (lambda call: call._replace(window_left=2.0), "window_left must be an int of 64 bits, found float"),
        (lambda call: call._replace(window_right=2**63), "window_right must be an int of 64 bits, found int"),
        (lambda call: call._replace(num_prefix=True), "num_prefix must be an int of 64 bits, found bool"),
    ],
)  # fmt: skip
def test_the_shared_arguments_are_one_tuple(change: Callable[[Any], object], message: str) -> None:
    changed = change(AttentionCall(**attention_arguments()))
    row = torch.zeros(B, M, H, DV)
    with pytest.raises(TypeError, match="^attention_forward: " + re.escape(message) + "$"):
        _C.attention_forward(changed, AttentionOutputs(None, row, None, None), 1)
    with pytest.raises(TypeError, match="^attention_backward: " + re.escape(message) + "$"):
        _C.attention_backward(changed, AttentionGradients(*[row] * 7), 1)


def test_outputs_and_gradients_are_tuples() -> None:
    call = AttentionCall(**attention_arguments())
    with pytest.raises(TypeError, match="^attention_forward: outputs must be a tuple, found Tensor$"):
        _C.attention_forward(call, torch.zeros(B, M, H, DV), 1)
    with pytest.raises(
        TypeError, match="^attention_backward: gradients must be a tuple that goes on with grad_k, found"
    ):
        _C.attention_backward(call, (torch.zeros(B, M, H, DV), None, None, torch.zeros(M, H, D)), 1)


def test_tensors_with_gradients_are_viewed() -> None:
    leaf = torch.zeros(7, 2, 5, requires_grad=True)
    forward(k=leaf)
    forward(k=leaf * 2)
