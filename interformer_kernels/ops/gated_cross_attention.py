"""Gated cross attention: a few dense or jagged queries of each row attend to all keys of the row."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels._calls import AttentionCall
from interformer_kernels.ops import _eager, _shared_keys
from interformer_kernels.ops._attention import ATTENTION, registered
from interformer_kernels.ops._attention_options import pair_of_times, seed_tensor, without_idle_seed
from interformer_kernels.ops._public import PublicOp
from interformer_kernels.ops._sharding import over_shards

OP = PublicOp("gated_cross_attention", ATTENTION, ("dense", "packed"), required=("v",))


@over_shards(OP)
def gated_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor,
    *,
    q_offsets: Tensor | None = None,
    kv_rows: Tensor | None = None,
    gate: Tensor | None = None,
    gate_form: str = "multiply",
    gate_activation: str = "sigmoid",
    residual: Tensor | None = None,
    scale: float | None = None,
    score: str = "softmax",
    post_scale: float = 1.0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    times: tuple[Tensor, Tensor] | None = None,
    time_edges: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention of each row's queries over all keys of the row, gated and added to a residual in the same call.

    .. math:: A_{b,i} = \sum_{t \in b} \mathrm{softmax}_t(scale \cdot \langle q_{b,i}, k_t \rangle)\, v_t, \qquad
              out = residual + G(A, gate)

    For one row and one head this is, in PyTorch::

        s = scale * q[b] @ k[start:end].T               # [N, L]
        a = torch.softmax(s, -1) @ v[start:end]         # [N, Dv]
        out = a if gate is None else a * torch.sigmoid(gate)
        out = out if residual is None else residual + out

    Without ``gate`` and ``residual`` it is plain cross attention. With ``B`` rows, ``N`` queries of a row (``Tq`` query
    tokens where they are jagged), ``Tk`` key tokens, ``H`` query heads, ``Hk`` key/value heads (``H % Hk == 0``; query
    head ``h`` reads key/value head ``h // (H // Hk)``), ``D`` and ``Dv`` channels of a key and of a value head:

    Args:
        q: queries, dense ``[B, N, H, D]``, or jagged ``[Tq, H, D]`` with ``q_offsets``.
        k: keys ``[Tk, Hk, D]``.
        v: values ``[Tk, Hk, Dv]``.
        kv_offsets: ``[B+1]`` int32 or int64: row ``b`` has the keys ``k[kv_offsets[b]:kv_offsets[b+1]]``. Tokens from
            ``kv_offsets[B]`` on belong to no row: they are not read and get zero gradients.
        q_offsets: ``[B+1]`` of jagged queries; outputs and gradients of their tail tokens are zero.
        kv_rows: ``[B]`` int32 or int64: row ``b`` of the queries reads row ``kv_rows[b]`` of the keys, in any order and
            any number of times; then ``kv_offsets`` has as many rows as there are rows of keys, ``[R+1]``. Keys are
            never copied, and their gradients are sums over query rows in ascending order. A query's bits do not depend
            on who else reads its keys. Query rows that stand in the order of their key rows are not copied either on
            the CPU. Values outside ``[0, R)`` are errors where contents are checked; elsewhere their rows see no key.
            None: row ``b`` reads row ``b``.
        gate: anything that broadcasts to the output; its gradient is summed over the broadcast axes.
        gate_form: ``"multiply"``: ``G = A * act(gate)``; ``"self"``: ``G = act(A * gate)`` (InterFormer's equation 10).
        gate_activation: ``"sigmoid"``, ``"tanh"``, ``"silu"`` or ``"identity"``.
        residual: added to the result; anything that broadcasts to it, as the gate does.
        scale: factor of the scores; None is ``1/sqrt(D)``.
        score: ``"softmax"``, or ``"identity"``, ``"relu"``, ``"silu"``, ``"gelu"`` (by erf): then
            ``A = c * sum_t act(scale * <q, k_t>) v_t``.
        post_scale: the factor ``c``; 1 with softmax.
        softcap: scores become ``softcap * tanh(s / softcap)``, before any bias; 0 leaves them.
        sinks: ``[H]`` in the accumulation dtype (float32; float64 for float64): one more term ``exp(sinks[h])`` in the
            softmax's sum, which has no value; ``lse`` includes it.
        position_bias: ``[Hb, 2 P + 1]`` in the accumulation dtype, ``Hb`` 1 or ``H``: added to the score of key ``j``
            of ``L`` at ``clamp(L - j, -P, P) + P``, for all queries stand behind the last key.
        time_bias: ``[Hb, bins]``, as ``position_bias``: added at the number of edges that are at most ``|t_i - t_j|``.
        times: the pair of queries' and keys' times, int64 ``[B, N]`` (or ``[Tq]``) and ``[Tk]``.
        time_edges: int64 ``[bins-1]``, ascending.
        dropout_p: the probability with which a weight is dropped, after the softmax (or the pointwise score); the
            others are divided by ``1 - dropout_p``. ``lse`` does not see it.
        dropout_seed: an int, or an int64 tensor without axes on the device, required where weights are dropped; see
            :func:`jagged_attention`.
        return_lse: also return the log-sum-exp of each query's scores (softmax only), which is differentiable;
            :func:`merge_attention` merges attentions over disjoint keys by it.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None takes the fastest that can serve.

    Returns:
        ``[B, N, H, Dv]`` or ``[Tq, H, Dv]`` in the inputs' dtype, and ``lse`` (the same without its last axis;
        float32, float64 for float64) if asked. A row without keys has ``A = 0`` and ``lse = -inf``, and its gradients
        are finite.

    Shapes and dtypes: float32, bfloat16, float16 (float64 on the reference and cpu backends); all floating tensors
    share one dtype and device, or are cast to the autocast dtype under ``torch.autocast``. ``B == 0``, ``T == 0``,
    ``N == 0`` and empty rows are ordinary inputs. Any strides with a contiguous last axis are read in place.

    DTensors sharded over heads or rows are computed part by part, and nothing is sent: see ``ops/_dtensor.py``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape, value, device or (on CPU; elsewhere with ``set_validation("full")``) an offset is wrong.
        RuntimeError: the named backend cannot serve the call.

    Source: InterFormer (arXiv 2411.09852), section 4.3 and equation 10; generalised dot-product attention
    (arXiv 2602.10016).
    """
    layout = "dense" if q_offsets is None else "packed"
    maps = gate_form, gate_activation, scale, score, post_scale  # the check below makes a scale of None a number
    times_q, times_k = pair_of_times(OP, times, False)
    seed = seed_tensor(OP, dropout_seed, k)
    call = AttentionCall(
        layout, q, k, v, q_offsets, kv_offsets, gate, *maps,  # type: ignore[arg-type]
        softcap=softcap, sinks=sinks, position_bias=position_bias, queries_at_end=True, time_bias=time_bias,
        times_q=times_q, times_k=times_k, time_edges=time_edges, dropout_p=dropout_p, dropout_seed=seed,
    )  # fmt: skip
    if kv_rows is not None:
        return _shared_keys.attend(OP, call, residual, kv_rows, backend, return_lse)
    eager = _eager.attention(OP, call, residual, backend, return_lse)
    if eager is not None:
        return eager
    call, residual = OP.checked(call, residual)
    if call.dropout_seed is not None:
        call = without_idle_seed(call)
    out: Tensor | tuple[Tensor, Tensor] = registered(OP, call, residual, backend, return_lse)
    return out
