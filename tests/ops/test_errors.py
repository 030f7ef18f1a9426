"""Every line of docs/ops.md, "Errors": the right exception, with the argument, what was wanted and what was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels.testing import Case, offsets_of, rotary_tables

LENGTHS = (3, 0, 2)


def inputs(op: str, **extra: Any) -> dict[str, Any]:
    """Good keyword arguments of the op, from which each test spoils one."""
    case = Case(op, "", lengths=LENGTHS, tail=0, **{"head_size": 8, "value_size": 6, "kv_heads": 2, **extra})
    made = testing.make_inputs(case, torch.float32)
    del made["grad_out"]
    return made


def refuses(op: str, kind: type[Exception], match: str, made: dict[str, Any], **spoiled: Any) -> None:
    with pytest.raises(kind, match=match) as caught:
        getattr(ik, op)(**{**made, **spoiled})
    assert str(caught.value).startswith(f"{op}: ")


JAGGED, PMA, CROSS, ROTARY, FFN, SOFTMAX, SUM = testing.OPS
Q, K = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
OFFSETS = offsets_of(LENGTHS)
COS, SIN = rotary_tables(8, 8)
HEAD_SIZE = "D = 8"

KINDS: list[tuple[str, dict[str, Any], str]] = [
    (JAGGED, {"q": [1.0]}, r"q must be a tensor of float32, bfloat16, float16 or float64, found \[1.0\] \(list\)"),
    (JAGGED, {"q": Q.long()}, r"q must be a tensor of float32.* found a tensor \[5, 4, 8\] of torch.int64 on cpu"),
    (JAGGED, {"k": K.half()}, "k must have q's dtype torch.float32, found torch.float16"),
    (JAGGED, {"gate": 0.5}, r"gate must be a tensor of float32.* found 0.5 \(float\)"),
    (JAGGED, {"residual": Q.bool()}, "residual must be a tensor of float32.* found a tensor"),
    (JAGGED, {"offsets": [0, 5]}, r"offsets must be an int32 or int64 tensor, found \[0, 5\] \(list\)"),
    (JAGGED, {"offsets": OFFSETS.float()}, "offsets must be an int32 or int64 tensor, found a tensor"),
    (JAGGED, {"kv_offsets": OFFSETS.short()}, "kv_offsets must be an int32 or int64 tensor, found a tensor"),
    (JAGGED, {"causal": 1}, r"causal must be a bool, found 1 \(int\)"),
    (JAGGED, {"window": 3}, r"window must be a pair \(left, right\) of ints, found 3"),
    (JAGGED, {"window": (1.0, 2)}, r"window\[0\] must be an int, found 1.0"),
    (JAGGED, {"num_prefix": True}, "num_prefix must be an int, found True"),
    (JAGGED, {"scale": "x"}, "scale must be a number, found 'x'"),
    (JAGGED, {"score": None}, "score must be a string, one of softmax, .*; found None"),
    (JAGGED, {"return_lse": 1}, "return_lse must be a bool, found 1"),
    (JAGGED, {"rope": COS}, r"rope must be a pair \(cos, sin\) of tensors, found a tensor"),
    (JAGGED, {"rope": (COS, SIN.double())}, "rope's sin must be a float32 tensor, found a tensor"),
    (JAGGED, {"rope": (COS, SIN), "rope_positions": 3}, r"rope_positions must be an int tensor \[T\], or the pair"),
    (JAGGED, {"rope": (COS, SIN), "rope_positions": Q[:, 0, 0]}, r"rope_positions\[0\] must be an int32 or int64"),
    (JAGGED, {"rope_interleaved": None}, "rope_interleaved must be a bool, found None"),
    (JAGGED, {"backend": 1}, "backend must be a string, one of reference, cpu, triton, cuda; found 1"),
    (SOFTMAX, {"scores": [1.0]}, r"scores must be a tensor of float32, .* found \[1.0\] \(list\)"),
    (SUM, {"v": Q.half()}, "v must have weights's dtype torch.float32, found torch.float16"),
    (PMA, {"seeds": None, "k": None}, "k must be a tensor of float32"),
    (PMA, {"skip_prefix": 1.5}, "skip_prefix must be an int, found 1.5"),
    (CROSS, {"q_offsets": 3}, "q_offsets must be an int32 or int64 tensor, found 3"),
    (CROSS, {"k": None}, r"k must be a dense tensor \[Tk, Hk, D\], found None"),
    (CROSS, {"kv_rows": [0, 1, 2]}, r"kv_rows must be an int32 or int64 tensor, found \[0, 1, 2\] \(list\)"),
    (CROSS, {"kv_rows": OFFSETS.float()}, "kv_rows must be an int32 or int64 tensor, found a tensor"),
    (CROSS, {"kv_rows": OFFSETS[1:], "q": [1.0]}, "q must be a tensor of float32"),
    (CROSS, {"kv_rows": OFFSETS[1:], "kv_offsets": 3}, "kv_offsets must be an int32 or int64 tensor, found 3"),
    (ROTARY, {"positions": Q[:, 0, 0]}, "positions must be an int32 or int64 tensor, found a tensor"),
    (ROTARY, {"interleaved": "yes"}, "interleaved must be a bool, found 'yes'"),
    (FFN, {"weight": torch.randn(3, 8, 6).double()}, "weight must have x's dtype torch.float32, found torch.float64"),
    (FFN, {"activation": 3}, "activation must be a string"),
]

VALUES: list[tuple[str, dict[str, Any], str]] = [
    (JAGGED, {"q": Q[0]}, r"q must be \[Tq, H, D\], found shape \[4, 8\]"),
    (JAGGED, {"k": K[:4]}, r"k must be \[Tk, Hk, D\] with Tk = 5, D = 8, found shape \[4, 2, 8\]"),
    (JAGGED, {"k": K[..., :4]}, rf"k must be \[Tk, Hk, D\] with Tk = 5, {HEAD_SIZE}, found shape \[5, 2, 4\]"),
    (JAGGED, {"v": K[:, :1]}, r"v must be \[Tk, Hk, Dv\] with Tk = 5, Hk = 2, found shape \[5, 1, 8\]"),
    (JAGGED, {"q": Q[:, :3]}, "number of query heads must be a multiple of the 2 key/value heads, found 3"),
    (JAGGED, {"v": K[..., :0]}, "axis Dv must be at least 1, found 0"),
    (JAGGED, {"offsets": OFFSETS[:0]}, r"offsets must be \[B\+1\] with at least one entry, found shape \[0\]"),
    (JAGGED, {"offsets": OFFSETS[None]}, r"offsets must have one axis, found shape \[1, 4\]"),
    (JAGGED, {"offsets": OFFSETS.to("meta")}, "offsets must be on the values' device cpu, found meta"),
    (JAGGED, {"kv_offsets": OFFSETS[:3]}, r"kv_offsets must be \[B\+1\] with B = 3 \(from offsets\), found B = 2"),
    (JAGGED, {"k": K.to("meta")}, "k must be on q's device cpu, found meta"),
    (
        JAGGED,
        {"gate": torch.randn(5, 4, 5)},
        r"gate must broadcast to the output's shape \[5, 4, 6\], found \[5, 4, 5\]",
    ),
    (JAGGED, {"gate": torch.randn(1, 5, 4, 6)}, r"gate must broadcast to the output's shape \[5, 4, 6\]"),
    (
        JAGGED,
        {"residual": torch.randn(4, 5)},
        r"residual must broadcast to the output's shape \[5, 4, 6\], found \[4, 5\]",
    ),
    (JAGGED, {"window": (-2, 0)}, r"window\[0\] must be at least -1, found -2"),
    (JAGGED, {"num_prefix": -1}, "num_prefix must be at least 0, found -1"),
    (JAGGED, {"scale": float("nan")}, "scale must be finite, found nan"),
    (JAGGED, {"score": "tanh"}, "score must be one of softmax, identity, relu, silu, gelu; found 'tanh'"),
    (JAGGED, {"post_scale": 2.0}, 'post_scale must be 1 with score="softmax", found 2.0'),
    (JAGGED, {"score": "silu", "return_lse": True}, 'return_lse must be False unless score="softmax"'),
    (JAGGED, {"gate_form": "add"}, "gate_form must be one of multiply, self; found 'add'"),
    (JAGGED, {"gate_activation": "relu"}, "gate_activation must be one of sigmoid, tanh, silu, identity; found 'relu'"),
    (JAGGED, {"rope": rotary_tables(8, 10)}, rf"rope's cos must be \[P, R/2\] with P >= 1 and R <= {HEAD_SIZE}"),
    (JAGGED, {"rope": (COS, SIN[:4])}, r"rope's sin must have cos's shape \[8, 4\], found \[4, 4\]"),
    (JAGGED, {"rope": (COS.to("meta"), SIN)}, "rope's cos must be on the values' device cpu, found meta"),
    (JAGGED, {"rope": (COS, SIN), "kv_offsets": OFFSETS}, "rope_positions must be the pair .* found None"),
    (JAGGED, {"rope_positions": OFFSETS}, "rope_positions must be None without rope, found a tensor"),
    (JAGGED, {"rope": (COS, SIN), "rope_positions": OFFSETS}, r"rope_positions\[0\] must be \[Tq\] with Tq = 5, found"),
    (JAGGED, {"backend": "numpy"}, "backend must be one of reference, cpu, triton, cuda; found 'numpy'"),
    (PMA, {"seeds": Q[..., :4]}, rf"seeds must be \[M, H, D\] with {HEAD_SIZE}, found shape \[5, 4, 4\]"),
    (PMA, {"skip_prefix": -1}, "skip_prefix must be at least 0, found -1"),
    (CROSS, {"q": Q}, r"q must be \[B, N, H, D\] with B = 3, found shape \[5, 4, 8\]"),
    (CROSS, {"q": Q[None, :2]}, r"q must be \[B, N, H, D\] with B = 3, found shape \[1, 2, 4, 8\]"),
    (ROTARY, {"positions": OFFSETS}, r"positions must be \[T\] with T = 5, found shape \[4\]"),
    (FFN, {"weight": torch.randn(2, 8, 6)}, r"weight must be \[B, E, F\] with B = 3, E = 8, found shape \[2, 8, 6\]"),
    (FFN, {"bias": torch.randn(3, 5)}, r"bias must be \[B, F\] with B = 3, F = 6, found shape \[3, 5\]"),
    (FFN, {"residual": torch.randn(5, 5)}, r"residual must broadcast to the output's shape \[5, 6\], found \[5, 5\]"),
    (SOFTMAX, {"scores": torch.randn(5, 2, 2)}, r"scores must be \[T, H\], found shape \[5, 2, 2\]"),
    (SOFTMAX, {"offsets": OFFSETS[:, None]}, r"offsets must have one axis, found shape \[4, 1\]"),
    (SUM, {"weights": torch.randn(5)}, r"v must be \[T, H, D\] with T = 5, H = 1, found shape \[5, 4, 8\]"),
    (SUM, {"v": torch.randn(4, 4, 8)}, r"v must be \[T, H, D\] with T = 5, H = 4, found shape \[4, 4, 8\]"),
    (FFN, {"activation": "tanh"}, "activation must be one of identity, relu, silu, gelu; found 'tanh'"),
]

CONTENTS: list[tuple[str, dict[str, Any], str]] = [
    (JAGGED, {"offsets": torch.tensor([1, 2, 5])}, r"offsets\[0\] must be 0, found 1"),
    (JAGGED, {"offsets": torch.tensor([0, 3, 2])}, r"offsets\[2\] must be at least 3, the entry before it, found 2"),
    (JAGGED, {"offsets": torch.tensor([0, 3, 6])}, r"offsets\[2\] must be at most 5, the number of tokens, found 6"),
    (JAGGED, {"offsets": torch.tensor([0, -3, 5], dtype=torch.int32)}, r"offsets\[1\] must be at least 0, .* found -3"),
    (JAGGED, {"kv_offsets": torch.tensor([0, 3, 3, 6])}, r"kv_offsets\[3\] must be at most 5"),
    (JAGGED, {"rope": rotary_tables(2, 8)}, "rows of offsets must have at most P = 2 tokens, found 3"),
    (
        JAGGED,
        {"rope": (COS, SIN), "rope_positions": torch.tensor([0, 1, 8, 0, 0])},
        r"rope_positions .*\[2\] must lie in \[0, P = 8\), found 8",
    ),
    (PMA, {"offsets": torch.tensor([0, 9])}, r"offsets\[1\] must be at most 5"),
    (CROSS, {"kv_offsets": torch.tensor([0, 4, 3, 5])}, r"kv_offsets\[2\] must be at least 4"),
    (ROTARY, {"offsets": torch.tensor([2, 5])}, r"offsets\[0\] must be 0, found 2"),
    (ROTARY, {"positions": torch.tensor([0, -1, 0, 0, 0])}, r"positions\[1\] must lie in \[0, P = 3\), found -1"),
    (SOFTMAX, {"offsets": torch.tensor([0, 3, 2])}, r"offsets\[2\] must be at least 3"),
    (SUM, {"offsets": torch.tensor([0, 9])}, r"offsets\[1\] must be at most 5"),
    (FFN, {"offsets": torch.tensor([0, 1, 2, 9])}, r"offsets\[3\] must be at most 5"),
]


def ids(cases: list[tuple[str, dict[str, Any], str]]) -> list[str]:
    return [f"{op}-{'-'.join(spoiled)}-{i}" for i, (op, spoiled, _) in enumerate(cases)]


@pytest.mark.parametrize(("op", "spoiled", "match"), KINDS, ids=ids(KINDS))
def test_wrong_kind_is_a_type_error(op: str, spoiled: dict[str, Any], match: str) -> None:
    refuses(op, TypeError, match, inputs(op, rope=8 if op == ROTARY else 0), **spoiled)


@pytest.mark.parametrize(("op", "spoiled", "match"), VALUES, ids=ids(VALUES))
def test_wrong_shape_value_or_device_is_a_value_error(op: str, spoiled: dict[str, Any], match: str) -> None:
    refuses(op, ValueError, match, inputs(op, rope=8 if op == ROTARY else 0), **spoiled)


@pytest.mark.parametrize(("op", "spoiled", "match"), CONTENTS, ids=ids(CONTENTS))
def test_wrong_contents_are_a_value_error_on_cpu(op: str, spoiled: dict[str, Any], match: str) -> None:
    refuses(op, ValueError, match, inputs(op, rope=8 if op == ROTARY else 0), **spoiled)


def test_positions_on_the_tail_are_not_checked() -> None:
    """Tail tokens belong to no row, so their positions may be anything."""
    positions = torch.tensor([0, 1, 2, 99, -5])
    out = ik.apply_rotary(Q, offsets_of((3,)), (COS, SIN), positions=positions)
    assert not out[3:].any()


def test_a_named_backend_that_cannot_serve_is_a_runtime_error() -> None:
    refuses(JAGGED, RuntimeError, "backend 'cuda' cannot serve: .*", inputs(JAGGED), backend="cuda")


def test_dense_query_rows_must_match_offsets_even_when_empty() -> None:
    refuses(CROSS, ValueError, "q must be .* with B = 0", inputs(CROSS), kv_offsets=OFFSETS[:1])
