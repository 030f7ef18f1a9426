"""PMA pooling: attention with learned queries that all rows share."""

from __future__ import annotations

from torch import Tensor

from interformer_kernels._calls import AttentionCall
from interformer_kernels.ops import _eager
from interformer_kernels.ops._attention import ATTENTION, registered
from interformer_kernels.ops._attention_options import seed_tensor, without_idle_seed
from interformer_kernels.ops._public import PublicOp
from interformer_kernels.ops._sharding import over_shards

OP = PublicOp(
    "pma_pooling",
    ATTENTION,
    ("shared",),
    lead="k",
    names={"q": "seeds", "kv_offsets": "offsets", "Tk": "T"},
)


@over_shards(OP)
def pma_pooling(
    seeds: Tensor,
    k: Tensor,
    v: Tensor | None,
    offsets: Tensor,
    *,
    scale: float | None = None,
    skip_prefix: int = 0,
    score: str = "softmax",
    post_scale: float = 1.0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    gate: Tensor | None = None,
    gate_form: str = "multiply",
    gate_activation: str = "sigmoid",
    residual: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Pool every row of a jagged batch with learned queries (seeds) that all rows share.

    .. math:: A_{b,m} = \sum_{t \in b} \mathrm{softmax}_t(scale \cdot \langle s_m, k_t \rangle)\, v_t, \qquad
              out = residual + G(A, gate)

    For one row and one head this is, in PyTorch::

        s = scale * seeds @ k[start:end].T              # [M, L]
        a = torch.softmax(s, -1) @ v[start:end]         # [M, Dv]
        out = a if gate is None else a * torch.sigmoid(gate)
        out = out if residual is None else residual + out

    With ``B`` rows, ``T`` packed tokens, ``M`` seeds, ``H`` query heads, ``Hk`` key/value heads (``H % Hk == 0``; query
    head ``h`` reads key/value head ``h // (H // Hk)``), ``D`` and ``Dv`` channels of a key and of a value head:

    Args:
        seeds: ``[M, H, D]``, never copied per row. Its gradient sums over the rows in a fixed order.
        k: keys ``[T, Hk, D]``.
        v: values ``[T, Hk, Dv]``; None means ``v is k``, which is then read once.
        offsets: ``[B+1]`` int32 or int64: row ``b`` is ``k[offsets[b]:offsets[b+1]]``. Tokens from ``offsets[B]`` on
            belong to no row: they are not read and get zero gradients.
        scale: factor of the scores; None is ``1/sqrt(D)``.
        skip_prefix: leave out the first ``n`` tokens of each row (its CLS tokens, say).
        score: ``"softmax"``, or ``"identity"``, ``"relu"``, ``"silu"``, ``"gelu"`` (by erf): then
            ``A = c * sum_t act(scale * <s, k_t>) v_t``.
        post_scale: the factor ``c``; 1 with softmax.
        softcap: scores become ``softcap * tanh(s / softcap)``; 0 leaves them.
        sinks: ``[H]`` in the accumulation dtype (float32; float64 for float64): one more term ``exp(sinks[h])`` in the
            softmax's sum, which has no value; ``lse`` includes it.
        dropout_p: the probability with which a weight is dropped, after the softmax (or the pointwise score); the
            others are divided by ``1 - dropout_p``. ``lse`` does not see it.
        dropout_seed: an int, or an int64 tensor without axes on the device, required where weights are dropped; see
            :func:`jagged_attention`.
        gate: anything that broadcasts to the output ``[B, M, H, Dv]``; its gradient is summed over the broadcast axes.
        gate_form: ``"multiply"``: ``G = A * act(gate)``; ``"self"``: ``G = act(A * gate)`` (InterFormer's equation 10).
        gate_activation: ``"sigmoid"``, ``"tanh"``, ``"silu"`` or ``"identity"``.
        residual: added to the result; anything that broadcasts to it, as the gate does.
        return_lse: also return the log-sum-exp of each query's scores (softmax only), which is differentiable;
            :func:`merge_attention` merges attentions over disjoint keys by it.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None takes the fastest that can serve.

    Returns:
        ``[B, M, H, Dv]`` in the inputs' dtype, and ``lse [B, M, H]`` (float32; float64 for float64) if asked.
        A row with no tokens left has ``A = 0`` and ``lse = -inf``, and its gradients are finite.

    Shapes and dtypes: float32, bfloat16, float16 (float64 on the reference and cpu backends); all floating tensors
    share one dtype and device, or are cast to the autocast dtype under ``torch.autocast``. ``B == 0``, ``T == 0`` and
    empty rows are ordinary inputs. Any strides with a contiguous last axis are read in place.

    DTensors sharded over heads or rows are computed part by part, and nothing is sent: see ``ops/_dtensor.py``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a shape, value, device or (on CPU; elsewhere with ``set_validation("full")``) an offset is wrong.
        RuntimeError: the named backend cannot serve the call.

    Source: Set Transformer (Lee et al., 2019), section 3.2; InterFormer (arXiv 2411.09852), section 4.3.
    """
    maps = gate_form, gate_activation, scale, score, post_scale  # the check below makes a scale of None a number
    seed = seed_tensor(OP, dropout_seed, k)
    call = AttentionCall(
        "shared", seeds, k, v, None, offsets, gate, *maps,  # type: ignore[arg-type]
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=seed, skip_prefix=skip_prefix,
    )  # fmt: skip
    eager = _eager.attention(OP, call, residual, backend, return_lse)
    if eager is not None:
        return eager
    call, residual = OP.checked(call, residual)
    if call.dropout_seed is not None:
        call = without_idle_seed(call)
    out: Tensor | tuple[Tensor, Tensor] = registered(OP, call, residual, backend, return_lse)
    return out
