"""The arguments of every registered op, each declared once.

A call is a named tuple. Its fields, in their order, are the registered op's schema and the tuple that the native module
reads; reference, checks, fakes, autograd and DTensor rules follow from their annotations (`ops/_spec.py`). All
backends take a call as it is. The native ones read a second tuple, of what they write.

Axes: `B` rows, `Tq` and `Tk` packed tokens of queries and keys, `N` queries of a row, `M` seeds, `H` query heads, `Hk`
key/value heads, `D` channels of a query or key head, `Dv` of a value head; `T` packed tokens, `E` input and `F` output
channels.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("packed", "dense", "shared")
SCORES = ("softmax", "identity", "relu", "silu", "gelu")
PREFIXES = ("full", "keys", "index")
GATE_FORMS = ("multiply", "self")
GATE_ACTIVATIONS = ("sigmoid", "tanh", "silu", "identity")
FFN_ACTIVATIONS = ("identity", "relu", "silu", "gelu")


@dataclasses.dataclass(frozen=True)
class Values:
    """A floating tensor, which gets a gradient: its axes, by layout where the layouts differ."""

    axes: str | dict[str, str]


@dataclasses.dataclass(frozen=True)
class Wide:
    """A tensor of the accumulation dtype, whatever the others' dtype, which gets a gradient: its axes."""

    axes: str


@dataclasses.dataclass(frozen=True)
class Broadcast:
    """A floating tensor that broadcasts to the output, and gets a gradient."""


@dataclasses.dataclass(frozen=True)
class Offsets:
    """The first token of each row, `[B+1]` int32 or int64, of the packed tensor whose name is `of`."""

    of: str


@dataclasses.dataclass(frozen=True)
class Positions:
    """The position of each token in the rotary tables, int32 or int64."""

    axis: str


@dataclasses.dataclass(frozen=True)
class Ints:
    """Whole numbers: their axes, by layout where the layouts differ, and their dtypes."""

    axes: str | dict[str, str]
    dtypes: tuple[torch.dtype, ...] = (torch.int64,)


@dataclasses.dataclass(frozen=True)
class Table:
    """A rotary table, float32 `[P, R/2]`, which gets no gradient."""


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of a few names."""

    choices: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """An int that is no less than a bound."""

    bound: int


@dataclasses.dataclass(frozen=True)
class Finite:
    """A finite number."""


@dataclasses.dataclass(frozen=True)
class Within:
    """A number from one bound to another."""

    least: float
    most: float


@dataclasses.dataclass(frozen=True)
class Scale:
    """A finite number; None, before a call is checked, is one over the square root of an axis."""

    axis: str


_SCHEMA_TYPES = {Tensor: "Tensor", float: "float", int: "SymInt", bool: "bool", str: "str"}


class Field(NamedTuple):
    """One field of a call."""

    name: str
    type: type
    optional: bool
    note: Any

    @property
    def schema(self) -> str:
        """The field as an argument of a registered op."""
        return f"{_SCHEMA_TYPES[self.type]}{'?' if self.optional else ''} {self.name}"

    @property
    def differentiable(self) -> bool:
        """Whether the field gets a gradient."""
        return isinstance(self.note, (Values, Wide, Broadcast))


def fields_of(call: type) -> tuple[Field, ...]:
    """The fields of a call, in their order."""
    return tuple(_field(name, hint) for name, hint in typing.get_type_hints(call, include_extras=True).items())


def _field(name: str, hint: Any) -> Field:
    note = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, note = typing.get_args(hint)
    optional = isinstance(hint, types.UnionType)
    kind = next(part for part in typing.get_args(hint) if part is not types.NoneType) if optional else hint
    return Field(name, kind, optional, note)


class AttentionCall(NamedTuple):
    """Attention of the queries of each row over the keys of the same row; the three public ops differ by `layout`.

    Queries are "packed" `[Tq, H, D]` with offsets of their own (None: the keys'), "dense" `[B, N, H, D]`, or "shared"
    by all rows, `[M, H, D]`. `v` None stands for `k`. Rotary embedding and masks are for packed queries, biases for
    packed and dense ones; a public op without an option leaves its neutral value here. `Hb` is `H`, or 1 for all heads.
    """

    layout: Annotated[str, OneOf(LAYOUTS)]
    q: Annotated[Tensor, Values({"packed": "Tq H D", "dense": "B N H D", "shared": "M H D"})]
    k: Annotated[Tensor, Values("Tk Hk D")]
    v: Annotated[Tensor | None, Values("Tk Hk Dv")]
    q_offsets: Annotated[Tensor | None, Offsets("q")]
    kv_offsets: Annotated[Tensor, Offsets("k")]
    gate: Annotated[Tensor | None, Broadcast()] = None
    gate_form: Annotated[str, OneOf(GATE_FORMS)] = "multiply"
    gate_activation: Annotated[str, OneOf(GATE_ACTIVATIONS)] = "sigmoid"
    scale: Annotated[float, Scale("D")] = 1.0
    score: Annotated[str, OneOf(SCORES)] = "softmax"
    post_scale: Annotated[float, Finite()] = 1.0
    causal: bool = False
    window_left: Annotated[int, AtLeast(-1)] = -1
    window_right: Annotated[int, AtLeast(-1)] = -1
    num_prefix: Annotated[int, AtLeast(0)] = 0
    prefix: Annotated[str, OneOf(PREFIXES)] = "full"
    full_tail: Annotated[int, AtLeast(0)] = 0
    num_targets: Annotated[Tensor | None, Ints("B", (torch.int32, torch.int64))] = None
    softcap: Annotated[float, Within(0.0, sys.float_info.max)] = 0.0
    sinks: Annotated[Tensor | None, Wide("H")] = None
    position_bias: Annotated[Tensor | None, Wide("Hb distances")] = None
    queries_at_end: bool = False  # for distances, all queries stand behind the last key
    queries_apart: bool = False  # a query's bits do not depend on the number of its row's queries
    time_bias: Annotated[Tensor | None, Wide("Hb bins")] = None
    times_q: Annotated[Tensor | None, Ints({"packed": "Tq", "dense": "B N", "shared": ""})] = None
    times_k: Annotated[Tensor | None, Ints("Tk")] = None
    time_edges: Annotated[Tensor | None, Ints("edges")] = None
    dropout_p: Annotated[float, Within(0.0, 1.0)] = 0.0
    dropout_seed: Annotated[Tensor | None, Ints("")] = None
    skip_prefix: Annotated[int, AtLeast(0)] = 0
    cos: Annotated[Tensor | None, Table()] = None
    sin: Annotated[Tensor | None, Table()] = None
    positions_q: Annotated[Tensor | None, Positions("Tq")] = None
    positions_k: Annotated[Tensor | None, Positions("Tk")] = None
    rope_interleaved: bool = False

    @property
    def drops(self) -> bool:
        """Whether some weights are dropped, and others may not be."""
        return 0 < self.dropout_p < 1

    @property
    def scales_sum(self) -> bool:
        """Whether the weighted sum of values is multiplied by another number than 1, as no mean is."""
        return self.score != "softmax" and self.post_scale != 1

    @property
    def self_attention(self) -> bool:
        """Whether queries and keys are the same tokens, with the same offsets."""
        return self.layout == "packed" and self.q_offsets is None

    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output: `[Tq, H, Dv]`, `[B, N, H, Dv]` or `[B, M, H, Dv]`."""
        channels = (self.k if self.v is None else self.v).shape[2]
        rows = (self.kv_offsets.shape[0] - 1,) if self.layout == "shared" else ()
        return (*rows, *self.q.shape[:-1], channels)

    def out_offsets(self) -> Tensor | None:
        """Offsets of the output's rows; None where it has no tail, because every row has as many queries."""
        if self.layout != "packed":
            return None
        return self.kv_offsets if self.q_offsets is None else self.q_offsets


class AttentionOutputs(NamedTuple):
    """Tensors of the output's side; all but the residual are written."""

    residual: Tensor | None
    out: Tensor
    lse: Tensor | None
    attn_out: Tensor | None


class AttentionGradients(NamedTuple):
    """Gradients of attention; `grad_out`, `attn_out` and `grad_lse` are read, the others written."""

    grad_out: Tensor
    attn_out: Tensor | None
    grad_lse: Tensor | None
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor | None
    grad_gate: Tensor | None
    grad_sinks: Tensor | None = None
    grad_position_bias: Tensor | None = None
    grad_time_bias: Tensor | None = None


class FoldedCall(NamedTuple):
    """`pma_pooling` of projected tokens with folded projections: `ops/pma_folded.py`, whose eager calls it holds.

    `seeds [M, H, D]`, weights `[H*D, E]`, `value_bias [H*D]`, `x [T, E]`. No registered op takes it.
    """

    seeds: Tensor
    key_weight: Tensor
    value_weight: Tensor
    value_bias: Tensor | None
    x: Tensor
    offsets: Tensor
    scale: float


class FoldedOutputs(NamedTuple):
    """Tensors that are written: the output `[B, M, H, D]`, and the pooled tokens `[B, M, H, E]` where asked."""

    out: Tensor
    pooled: Tensor | None


class FfnCall(NamedTuple):
    """Every token times the weight matrix of its row."""

    x: Annotated[Tensor, Values("T E")]
    weight: Annotated[Tensor, Values("B E F")]
    offsets: Annotated[Tensor, Offsets("x")]
    bias: Annotated[Tensor | None, Values("B F")]
    activation: Annotated[str, OneOf(FFN_ACTIVATIONS)]

    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output, `[T, F]`."""
        return self.x.shape[0], self.weight.shape[2]

    def out_offsets(self) -> Tensor:
        """Offsets of the output's rows."""
        return self.offsets


class FfnOutputs(NamedTuple):
    """Tensors of the output's side; the residual is read."""

    residual: Tensor | None
    out: Tensor


class FfnGradients(NamedTuple):
    """Gradients of the feed-forward; `grad_out` is read, the others are written."""

    grad_out: Tensor
    grad_x: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None


class RotaryCall(NamedTuple):
    """Pairs of channels of every token, rotated by the angle of its position."""

    x: Annotated[Tensor, Values("T H D")]
    offsets: Annotated[Tensor, Offsets("x")]
    cos: Annotated[Tensor, Table()]
    sin: Annotated[Tensor, Table()]
    positions: Annotated[Tensor | None, Positions("T")]
    interleaved: bool

    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output, `[T, H, D]`."""
        return tuple(self.x.shape)

    def out_offsets(self) -> Tensor:
        """Offsets of the output's rows."""
        return self.offsets


class RotaryOutputs(NamedTuple):
    """The tensor that is written: x rotated or, backwards, turned back."""

    out: Tensor
    backwards: bool


class SoftmaxCall(NamedTuple):
    """Scores of tokens, each head of a row normalised by its softmax."""

    scores: Annotated[Tensor, Values("T H")]
    offsets: Annotated[Tensor, Offsets("scores")]

    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output, `[T, H]`."""
        return tuple(self.scores.shape)

    def out_offsets(self) -> Tensor:
        """Offsets of the output's rows."""
        return self.offsets


class SoftmaxOutputs(NamedTuple):
    """The tensor that is written."""

    out: Tensor


class SoftmaxGradients(NamedTuple):
    """Gradients of the softmax; `grad_out` is read, the other written."""

    grad_out: Tensor
    grad_scores: Tensor


class WeightedSumCall(NamedTuple):
    """Values of each row's tokens, summed with the tokens' weights."""

    weights: Annotated[Tensor, Values("T H")]
    v: Annotated[Tensor, Values("T H D")]
    offsets: Annotated[Tensor, Offsets("v")]

    def out_shape(self) -> tuple[int, ...]:
        """Shape of the output, `[B, H, D]`."""
        return (self.offsets.shape[0] - 1, *self.v.shape[1:])

    def out_offsets(self) -> None:
        """None: the output has a place for every row, and no tail."""
        return


class WeightedSumOutputs(NamedTuple):
    """The tensor that is written."""

    out: Tensor


class WeightedSumGradients(NamedTuple):
    """Gradients of the weighted sum; `grad_out` is read, the others are written."""

    grad_out: Tensor
    grad_weights: Tensor
    grad_v: Tensor
