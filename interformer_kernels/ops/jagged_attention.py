"""Jagged attention: every token of a row attends to the tokens of the same row, without padding."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels.ops import _attention as attention
from interformer_kernels.ops._registered import Bound, RegisteredOp, autocast, wants_gradients
from interformer_kernels.ops._sharding import over_shards

OP = "jagged_attention"


def forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    kv_offsets: Optional[Tensor],
    cos: Optional[Tensor],
    sin: Optional[Tensor],
    positions_q: Optional[Tensor],
    positions_k: Optional[Tensor],
    gate: Optional[Tensor],
    residual: Optional[Tensor],
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    num_prefix: int,
    rope_interleaved: bool,
    score: str,
    post_scale: float,
    gate_form: str,
    gate_activation: str,
    keep_attn_out: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return attention.empty_outputs(q, (*q.shape[:2], v.shape[2]), score, keep_attn_out)


def backward_fake(
    grad_out: Tensor,
    attn_out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    kv_offsets: Optional[Tensor],
    cos: Optional[Tensor],
    sin: Optional[Tensor],
    positions_q: Optional[Tensor],
    positions_k: Optional[Tensor],
    gate: Optional[Tensor],
    scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    num_prefix: int,
    rope_interleaved: bool,
    score: str,
    post_scale: float,
    gate_form: str,
    gate_activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return attention.empty_gradients(q, k, v, gate)


def _validate(bound: Bound) -> None:
    q, k, offsets, kv_offsets = bound["q"], bound["k"], bound["offsets"], bound["kv_offsets"]
    checks.check_offsets_content(OP, "offsets", offsets, q.shape[0])
    if kv_offsets is not None:
        checks.check_offsets_content(OP, "kv_offsets", kv_offsets, k.shape[0])
    if bound["cos"] is None:
        return
    table_rows = bound["cos"].shape[0]
    sides = (("positions_q", "offsets", offsets), ("positions_k", "kv_offsets", kv_offsets))
    for name, offsets_name, row_offsets in sides:
        if bound[name] is not None:
            rows = offsets if row_offsets is None else row_offsets
            checks.check_positions_content(OP, f"rope_positions ({name})", bound[name], rows, table_rows)
        elif row_offsets is not None:
            checks.check_rows_fit_tables(OP, offsets_name, row_offsets, table_rows)


def _flops(bound: Bound) -> int:
    q, k, v, offsets = bound["q"], bound["k"], bound["v"], bound["offsets"]
    kv_offsets = offsets if bound["kv_offsets"] is None else bound["kv_offsets"]
    pairs = attention.row_pairs(kv_offsets, k.shape[0], offsets, q.shape[0])
    return attention.attention_flops(pairs, q.shape[1], q.shape[2], v.shape[2])


_op = RegisteredOp(
    OP,
    forward_fake,
    backward_fake,
    reference.jagged_attention,
    differentiable=("q", "k", "v", "gate", "residual"),
    extras=("lse", "attn_out"),
    validate=_validate,
    rows_mask=lambda bound: reference.inside_rows(bound["offsets"], bound["q"].shape[0]),
    flops=_flops,
    backward_over_forward=attention.BACKWARD_OVER_FORWARD,
    keeps=attention.keeps_attn_out,
)


@over_shards("Tq H Dv", q="Tq H D", k="Tk Hk D", v="Tk Hk Dv")
def jagged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    kv_offsets: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    num_prefix: int = 0,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_interleaved: bool = False,
    rope_positions: Tensor | tuple[Tensor, Tensor] | None = None,
    score: str = "softmax",
    post_scale: float = 1.0,
    gate: Tensor | None = None,
    gate_form: str = "multiply",
    gate_activation: str = "sigmoid",
    residual: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention inside every row of a jagged batch, with rotary embedding, masks, gate and residual in one call.

    .. math:: A_i = \sum_{j \in V(i)} \mathrm{softmax}_j(scale \cdot \langle q_i, k_j \rangle)\, v_j, \qquad
              out = residual + G(A, gate)

    For one row and one head this is, in PyTorch::

        s = scale * q[start:end] @ k[start:end].T
        a = torch.softmax(s.masked_fill(~visible, -torch.inf), -1) @ v[start:end]
        out = a if gate is None else a * torch.sigmoid(gate)
        out = out if residual is None else residual + out

    What query ``i`` sees of a row with ``Lq`` queries and ``Lk`` keys, at ``p = i + (Lk - Lq)`` (the last query stands
    at the last key); here ``Lq = Lk = 5``::

        causal           window=(1, 1)    window=(1, 1), num_prefix=1
        x . . . .        x x . . .        x x x x x
        x x . . .        x x x . .        x x x . .
        x x x . .        . x x x .        x x x x .
        x x x x .        . . x x x        x . x x x
        x x x x x        . . . x x        x . . x x

    With ``Tq`` query and ``Tk`` key tokens, ``B`` rows, ``H`` query heads, ``Hk`` key/value heads (``H % Hk == 0``;
    query head ``h`` reads key/value head ``h // (H // Hk)``), ``D`` and ``Dv`` channels of a key and of a value head:

    Args:
        q: queries ``[Tq, H, D]``.
        k: keys ``[Tk, Hk, D]``.
        v: values ``[Tk, Hk, Dv]``.
        offsets: ``[B+1]`` int32 or int64: row ``b`` has the queries ``q[offsets[b]:offsets[b+1]]``. Tokens from
            ``offsets[B]`` on belong to no row: they are not read, their outputs and gradients are zero.
        kv_offsets: ``[B+1]`` of the keys; None shares ``offsets`` (self attention).
        scale: factor of the scores; None is ``1/sqrt(D)``.
        causal: key ``j`` is seen only if ``j <= p``.
        window: ``(l, r)``: key ``j`` is seen only if ``p - l <= j <= p + r``; -1 leaves a side open.
        num_prefix: keys ``j < n`` of a row are seen by all, and queries ``i < n`` see every key, whatever the masks.
        rope: rotary tables ``(cos, sin)``, each float32 ``[P, R/2]`` with ``R <= D``: the first ``R`` channels of q and
            k are rotated by position. Gradients reach the unrotated q and k; the tables get none.
        rope_interleaved: channel pairs are ``(2c, 2c+1)`` instead of ``(c, c + R/2)``.
        rope_positions: int ``[T]``, or the pair ``(positions_q [Tq], positions_k [Tk])``, which is required with
            ``kv_offsets``; None is the index in the row. Positions outside ``[0, P)`` are an error where contents are
            validated, and clamped elsewhere.
        score: ``"softmax"``, or ``"identity"``, ``"relu"``, ``"silu"``, ``"gelu"`` (by erf): then
            ``A_i = post_scale * sum_j act(scale * <q_i, k_j>) v_j``.
        post_scale: factor of the sum for the scores other than softmax.
        gate: anything that broadcasts to the output ``[Tq, H, Dv]``; its gradient is summed over the broadcast axes.
        gate_form: ``"multiply"``: ``G = A * act(gate)``; ``"self"``: ``G = act(A * gate)`` (InterFormer's equation 10).
        gate_activation: ``"sigmoid"``, ``"tanh"``, ``"silu"`` or ``"identity"``.
        residual: added to the result; anything that broadcasts to it, as the gate does.
        return_lse: also return the log-sum-exp of each query's scores (softmax only); it has no gradient
            yet, and a backward that would need one raises an error: use ``lse.detach()``.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None takes the fastest that can serve.

    Returns:
        ``[Tq, H, Dv]`` in the inputs' dtype, and ``lse [Tq, H]`` (float32; float64 for float64) if asked.
        A query that sees no key has ``A = 0`` and ``lse = -inf``, and its gradients are finite.

    Shapes and dtypes: float32, bfloat16, float16 (float64 on the reference and cpu backends); all floating tensors but
    the tables share one dtype and device, or are cast to the autocast dtype under ``torch.autocast``. ``B == 0``,
    ``T == 0`` and empty rows are ordinary inputs. Any strides with a contiguous last axis are read in place.

    DTensors sharded over heads or rows are computed part by part, and nothing is sent: see ``ops/_dtensor.py``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape, value, device or (on CPU; elsewhere with ``set_validation("full")``) an offset or position
            is wrong.
        RuntimeError: the named backend cannot serve the call.

    Source: Vaswani et al., 2017, section 3.2.1; rotary embedding: Su et al., 2021, section 3.4.2; scores other than
    softmax: generalised dot-product attention (arXiv 2602.10016); InterFormer (arXiv 2411.09852), equations 8 to 10.
    """
    q, k, v, gate, residual = autocast(q, k, v, gate, residual)
    checks.check_floats(OP, "q", {"q": q, "k": k, "v": v, "gate": gate, "residual": residual})
    axes = checks.Axes(OP)
    axes.bind("q", q, ("Tq", "H", "D"))
    if kv_offsets is None:
        axes.sizes["Tk"] = axes["Tq"]
    axes.bind("k", k, ("Tk", "Hk", "D"))
    axes.bind("v", v, ("Tk", "Hk", "Dv"))
    checks.check_heads(OP, axes)
    checks.check_row_offsets(OP, "offsets", offsets, "kv_offsets", kv_offsets, q.device)
    residual = checks.check_epilogue(
        OP, gate, gate_form, gate_activation, residual, (axes["Tq"], axes["H"], axes["Dv"])
    )
    causal = checks.check_bool(OP, "causal", causal)
    left, right = checks.check_window(OP, window)
    num_prefix = checks.check_count(OP, "num_prefix", num_prefix)
    rope_interleaved = checks.check_bool(OP, "rope_interleaved", rope_interleaved)
    tables = (None, None) if rope is None else checks.check_rope(OP, rope, axes["D"], q.device)
    positions = _rope_positions(rope_positions, rope, kv_offsets, axes, q)
    factor, with_lse = checks.check_score(OP, score, post_scale, return_lse)
    scale = checks.default_scale(OP, scale, axes["D"])
    name = checks.backend_name(OP, backend)
    keep = attention.backward_reads_attn_out(OP, name, k, v, gate, score)
    keep = keep and wants_gradients(q, k, v, gate, residual)
    masks = causal, left, right, num_prefix, rope_interleaved
    options = scale, *masks, score, factor, gate_form, gate_activation, keep, name
    out, lse, _ = _op(q, k, v, offsets, kv_offsets, *tables, *positions, gate, residual, *options, shows_lse=with_lse)
    return (out, lse) if with_lse else out


def _rope_positions(
    given: object, rope: object, kv_offsets: Tensor | None, axes: checks.Axes, q: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`rope_positions` as the pair for queries and keys; `(None, None)` is the index in the row."""
    if given is None:
        if rope is not None and kv_offsets is not None:
            wanted = "the pair (positions_q, positions_k) where rope and kv_offsets are given"
            raise ValueError(f"{OP}: rope_positions must be {wanted}, found None")
        return None, None
    if rope is None:
        raise ValueError(f"{OP}: rope_positions must be None without rope, found {checks.describe(given)}")
    if kv_offsets is None and isinstance(given, Tensor):
        given = (given, given)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        wanted = "an int tensor [T], or the pair (positions_q [Tq], positions_k [Tk]), required with kv_offsets"
        raise TypeError(f"{OP}: rope_positions must be {wanted}; found {checks.describe(given)}")
    for name, x, axis in (("rope_positions[0]", given[0], "Tq"), ("rope_positions[1]", given[1], "Tk")):
        axes.bind(name, checks.check_index(OP, name, x, q.device), (axis,))
    return given[0], given[1]
