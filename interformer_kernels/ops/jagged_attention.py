"""Jagged attention: every token of a row attends to the tokens of the same row, without padding."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels._calls import AttentionCall
from interformer_kernels.ops import _eager
from interformer_kernels.ops._attention import ATTENTION, registered
from interformer_kernels.ops._attention_options import pair_of_times, seed_tensor, without_idle_seed
from interformer_kernels.ops._public import PublicOp
from interformer_kernels.ops._sharding import over_shards

OP = PublicOp("jagged_attention", ATTENTION, ("packed",), required=("v",), names={"q_offsets": "offsets"})


@over_shards(OP)
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
    prefix: str = "full",
    full_tail: int = 0,
    num_targets: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    rope_interleaved: bool = False,
    rope_positions: Tensor | tuple[Tensor, Tensor] | None = None,
    score: str = "softmax",
    post_scale: float = 1.0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    times: Tensor | tuple[Tensor, Tensor] | None = None,
    time_edges: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
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
        num_prefix: a prefix of ``n`` tokens of every row, with the meaning that ``prefix`` says.
        prefix: ``"full"``: keys ``j < n`` are seen by all, and queries ``i < n`` see every key, whatever the masks.
            ``"keys"``: keys ``j < n`` are seen by all whom ``causal`` lets see them, and queries have no privilege
            (semi-local attention). ``"index"``: the prefix is one place: with ``place(t) = max(t - n + 1, 0)``,
            ``causal`` and ``window`` compare places, and tokens of the prefix see every key (HSTU's contextual tokens).
        full_tail: the last ``n`` queries before the targets, and the targets, ignore ``window`` (not ``causal``).
        num_targets: int ``[B]``: the last tokens of each row that are **targets** (candidates), at most all of its
            queries and keys. With ``N`` other keys a target stands at ``p = N``: it sees of those what ``causal`` and
            ``window`` allow, and itself; nobody else sees a target. Other queries see the other keys alone.
        rope: rotary tables ``(cos, sin)``, each float32 ``[P, R/2]`` with ``R <= D``: the first ``R`` channels of q and
            k are rotated by position. Gradients reach the unrotated q and k; the tables get none.
        rope_interleaved: channel pairs are ``(2c, 2c+1)`` instead of ``(c, c + R/2)``.
        rope_positions: int ``[T]``, or the pair ``(positions_q [Tq], positions_k [Tk])``, which is required with
            ``kv_offsets``; None is the index in the row. Positions outside ``[0, P)`` are an error where contents are
            validated, and clamped elsewhere.
        score: ``"softmax"``, or ``"identity"``, ``"relu"``, ``"silu"``, ``"gelu"`` (by erf): then
            ``A_i = c * sum_j act(scale * <q_i, k_j>) v_j``.
        post_scale: the factor ``c``; 1 with softmax.
        softcap: scores become ``softcap * tanh(s / softcap)``, before any bias; 0 leaves them.
        sinks: ``[H]`` in the accumulation dtype (float32; float64 for float64): one more term ``exp(sinks[h])`` in the
            softmax's sum, which has no value; ``lse`` includes it.
        position_bias: ``[Hb, 2 P + 1]`` in the accumulation dtype, ``Hb`` 1 or ``H``: added to the scores at
            ``clamp(p - j, -P, P) + P``. Its gradient, as that of all tables, is summed in a fixed order.
        time_bias: ``[Hb, bins]``, as ``position_bias``: added at the number of edges that are at most ``|t_i - t_j|``.
        times: int64 ``[T]``, or the pair of queries' and keys' ``([Tq], [Tk])``, which is required with ``kv_offsets``.
        time_edges: int64 ``[bins-1]``, ascending.
        dropout_p: the probability with which a weight is dropped, after the softmax (or the pointwise score); the
            others are divided by ``1 - dropout_p``. ``lse`` does not see it.
        dropout_seed: an int, or an int64 tensor without axes on the device, required where weights are dropped. The
            same seed drops the same weights on every backend (Philox4x32-7 of seed, key, head and query).
        gate: anything that broadcasts to the output ``[Tq, H, Dv]``; its gradient is summed over the broadcast axes.
        gate_form: ``"multiply"``: ``G = A * act(gate)``; ``"self"``: ``G = act(A * gate)`` (InterFormer's equation 10).
        gate_activation: ``"sigmoid"``, ``"tanh"``, ``"silu"`` or ``"identity"``.
        residual: added to the result; anything that broadcasts to it, as the gate does.
        return_lse: also return the log-sum-exp of each query's scores (softmax only), which is differentiable;
            :func:`merge_attention` merges attentions over disjoint keys by it.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None takes the fastest that can serve.

    Returns:
        ``[Tq, H, Dv]`` in the inputs' dtype, and ``lse [Tq, H]`` (float32; float64 for float64) if asked.
        A query that sees no key has ``A = 0`` and ``lse = -inf``, and its gradients are finite.

    Shapes and dtypes: float32, bfloat16, float16 (float64 on the reference and cpu backends); all floating tensors but
    the tables share one dtype and device, or are cast to the autocast dtype under ``torch.autocast``. ``B == 0``,
    ``T == 0`` and empty rows are ordinary inputs. Any strides with a contiguous last axis are read in place.

    DTensors sharded over heads or rows are computed part by part, and nothing is sent: see ``ops/_dtensor.py``. A row's
    bits do not depend on the rows beside it, but for what it drops: that follows its place in the batch.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape, value, device or (on CPU; elsewhere with ``set_validation("full")``) an offset or position
            is wrong.
        RuntimeError: the named backend cannot serve the call.

    Source: Vaswani et al., 2017, section 3.2.1; rotary embedding: Su et al., 2021, section 3.4.2; scores other than
    softmax: generalised dot-product attention (arXiv 2602.10016); InterFormer (arXiv 2411.09852), equations 8 to 10;
    targets and prefixes: HSTU (Zhai et al., 2024); Philox: Salmon et al., 2011.
    """
    checks.check_index_kind(OP.name, "offsets", offsets)
    left, right = checks.check_window(OP.name, window)
    q_offsets, kv_offsets = (None, offsets) if kv_offsets is None else (offsets, kv_offsets)
    maps = gate_form, gate_activation, scale, score, post_scale  # the check below makes a scale of None a number
    times_q, times_k = pair_of_times(OP, times, q_offsets is None)
    tensors = q, k, v, q_offsets, kv_offsets, gate
    masks = causal, left, right, num_prefix, prefix, full_tail, num_targets
    scores = softcap, sinks, position_bias, False, False, time_bias, times_q, times_k, time_edges
    dropout = dropout_p, seed_tensor(OP, dropout_seed, k)
    call = AttentionCall("packed", *tensors, *maps, *masks, *scores, *dropout, rope_interleaved=rope_interleaved)  # type: ignore[arg-type]
    eager_call = _eager_call(call, rope, rope_positions)
    if eager_call is not None:
        eager = _eager.attention(OP, eager_call, residual, backend, return_lse)
        if eager is not None:
            return eager
    call, residual = OP.checked(call, residual)
    if call.dropout_seed is not None:
        call = without_idle_seed(call)
    cos, sin = (None, None) if rope is None else checks.check_rope(OP.name, rope, q.shape[2], q.device)
    positions_q, positions_k = _rope_positions(rope_positions, call, rope is not None)
    if rope is not None:
        call = call._replace(cos=cos, sin=sin, positions_q=positions_q, positions_k=positions_k)
    out: Tensor | tuple[Tensor, Tensor] = registered(OP, call, residual, backend, return_lse)
    return out


def _eager_call(call: AttentionCall, rope: object, rope_positions: object) -> AttentionCall | None:
    """The call with its tables as the native module takes it, unchecked; None for one that it would not serve."""
    if rope_positions is not None:
        return None
    if rope is None:
        return call if call.rope_interleaved is False else None
    if type(rope) is not tuple or len(rope) != 2 or call.q_offsets is not None:
        return None
    cos, sin = rope
    if not (isinstance(cos, Tensor) and isinstance(sin, Tensor)) or cos.requires_grad or sin.requires_grad:
        return None
    return call._replace(cos=cos, sin=sin)


def _rope_positions(given: object, call: AttentionCall, has_rope: bool) -> tuple[Tensor | None, Tensor | None]:
    """`rope_positions` as the pair for queries and keys; `(None, None)` is the index in the row."""
    op = OP.name
    if given is None:
        if has_rope and not call.self_attention:
            wanted = "the pair (positions_q, positions_k) where rope and kv_offsets are given"
            raise ValueError(f"{op}: rope_positions must be {wanted}, found None")
        return None, None
    if not has_rope:
        raise ValueError(f"{op}: rope_positions must be None without rope, found {checks.describe(given)}")
    if call.self_attention and isinstance(given, Tensor):
        given = (given, given)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        wanted = "an int tensor [T], or the pair (positions_q [Tq], positions_k [Tk]), required with kv_offsets"
        raise TypeError(f"{op}: rope_positions must be {wanted}; found {checks.describe(given)}")
    axes = checks.Axes(op, Tq=call.q.shape[0], Tk=call.k.shape[0])
    for name, positions, axis in (("rope_positions[0]", given[0], "Tq"), ("rope_positions[1]", given[1], "Tk")):
        axes.bind(name, checks.check_index(op, name, positions, call.q.device), (axis,))
    return given[0], given[1]
