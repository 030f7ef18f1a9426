"""Arguments of the kernels, in groups.

Tensors with their strides, and options that are compiled in, are NamedTuples. Sizes and limits of masks stay plain
integers: Triton specialises integers of tuples by value (1, multiples of 16), whatever `do_not_specialize` says, and
would compile a kernel anew for them. Kernels put them into `Sizes` and `Variant` at once. They also make their tuples
of tuples anew (`kv = KeysAndValues(kv.k, kv.v, kv.rope)`): Triton 3.6 would lose constants in them (strides of 1) at
a branch.

The tuples of attention's variant are in `_attention_variant.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# ---------------------------------------------------------------- tensors; `Any` is a tensor outside of kernels


class QueryOperand(NamedTuple):
    """A tensor of the queries' or the output's layout, with its strides of rows, tokens and heads."""

    pointer: Any
    row: Any
    token: Any
    head: Any


class GateOperand(NamedTuple):
    """The gate of the output's layout, which may broadcast along any axis."""

    pointer: Any
    row: Any
    token: Any
    head: Any
    channel: Any


class KeyOperand(NamedTuple):
    """Keys, values or other packed tokens `[T, H, D]`, with their strides of tokens and heads."""

    pointer: Any
    token: Any
    head: Any


class Table(NamedTuple):
    """A matrix with contiguous rows, such as tokens without heads or a rotary table, with the stride of its rows."""

    pointer: Any
    row: Any


class Rope(NamedTuple):
    """Rotary tables with the stride and the number of their rows, and explicit positions of queries and of keys (or of
    the only tokens); None is the index in the row."""

    cos: Any
    sin: Any
    row: Any
    rows: Any
    positions_q: Any
    positions_k: Any


class KeysAndValues(NamedTuple):
    """Both operands that are streamed past the queries, and the rotary embedding of keys and queries, if any."""

    k: KeyOperand
    v: KeyOperand
    rope: Rope | None


class Offsets(NamedTuple):
    """Bounds of the rows among query tokens and among key tokens."""

    q: Any
    kv: Any


class Epilogue(NamedTuple):
    """Sinks of the softmax, and operands of the epilogue, at the end of a forward; None where the call has none."""

    sinks: Any
    gate: GateOperand | None
    residual: QueryOperand | None


class Outputs(NamedTuple):
    """Contiguous outputs of the forward; None where they are not kept."""

    out: Any
    lse: Any
    attn_out: Any


class Partials(NamedTuple):
    """Sums over the splits of long rows: accumulators, and pairs of row maximum and row sum."""

    acc: Any
    stats: Any


class QuerySide(NamedTuple):
    """Operands and statistics of the queries in the backward; `delta` has pairs of a row sum and delta, which the pass
    before dQ makes from `attn_out`, unless that is None. `grad_lse` is None where nobody asks for that gradient, and
    `sinks` where the softmax has none.
    """

    q: QueryOperand
    grad: QueryOperand
    lse: Any
    delta: Any
    attn_out: Any
    grad_lse: Any
    sinks: Any


# ---------------------------------------------------------------- compiled in
# In Triton 3.6 their members are plain numbers and strings. A device function, `tl.zeros` among them, takes no string
# and no list of plain numbers. So kernels give a string a name first (`LAYOUT: tl.constexpr = SHAPE.layout`), and make
# tiles by `tl.full`.


class GateOptions(NamedTuple):
    """Form and activation of the gate."""

    form: str
    activation: str


class RopeOptions(NamedTuple):
    """Rotary embedding: its pairs of channels (0 without it), whether they are interleaved, and whether kernels rotate
    queries and keys as they load them; otherwise those come rotated. Kernels always rotate gradients back."""

    half: int
    interleaved: bool
    rotate_q: bool
    rotate_k: bool


class Shape(NamedTuple):
    """Shape of a call and of its tiles, as kernels of tiles of one row are compiled for it.

    `one_tile`: all rows are known to have no more queries than a tile.
    Its last fields but `precision` are those of `RopeOptions`.
    """

    d: int
    dv: int
    q_per_kv: int
    pack: int
    packs: int
    layout: str
    v_is_k: bool
    cell: int
    one_tile: bool
    block_q: int
    block_k: int
    block_d: int
    block_dv: int
    half: int
    interleaved: bool
    rotate_q: bool
    rotate_k: bool
    precision: str


class ShortShape(NamedTuple):
    """The same for kernels of rows of at most `most` tokens, and of more than `cell` if those are not short."""

    d: int
    dv: int
    q_per_kv: int
    kv_heads: int
    cell: int
    most: int
    block: int
    layout: str
    block_d: int
    block_dv: int
    half: int
    interleaved: bool
    rotate_q: bool
    rotate_k: bool
    precision: str


class GradPass(NamedTuple):
    """Kind of a backward pass over queries: for dQ, or else for the sums of P and of P * dP.

    `fp32_softmax`: the softmax of float32, whose gradients are divided by the sums of a pass before.
    `only_large_lse`: sums only for queries whose log-sum-exp has lost digits.
    `with_stats`: the pass for dQ makes and stores the statistics of its queries, too.
    """

    fp32_softmax: bool
    gradient: bool
    only_large_lse: bool
    with_stats: bool = False


# ---------------------------------------------------------------- made in kernels


class Sizes(NamedTuple):
    """Rows, query and key tokens of the batch; queries of a row where all have as many; skipped first keys."""

    rows: Any
    q_tokens: Any
    k_tokens: Any
    queries: Any
    skip: Any


class RowTask(NamedTuple):
    """A row of the batch with its first query, number of queries, first key, number of keys and number of targets."""

    row: Any
    first: Any
    count: Any
    k_first: Any
    keys: Any
    targets: Any
