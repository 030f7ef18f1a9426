"""PMA pooling: attention with learned queries that all rows share."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels.ops import _attention as attention
from interformer_kernels.ops._registered import Bound, RegisteredOp, any_number, autocast, wants_gradients
from interformer_kernels.ops._sharding import over_shards

OP = "pma_pooling"


def forward_fake(
    seeds: Tensor,
    k: Tensor,
    v: Optional[Tensor],
    offsets: Tensor,
    gate: Optional[Tensor],
    residual: Optional[Tensor],
    scale: float,
    skip_prefix: int,
    score: str,
    post_scale: float,
    gate_form: str,
    gate_activation: str,
    keep_attn_out: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (any_number(offsets.shape[0] - 1), *seeds.shape[:2], (k if v is None else v).shape[2])
    return attention.empty_outputs(k, shape, score, keep_attn_out)


def backward_fake(
    grad_out: Tensor,
    attn_out: Tensor,
    lse: Tensor,
    seeds: Tensor,
    k: Tensor,
    v: Optional[Tensor],
    offsets: Tensor,
    gate: Optional[Tensor],
    scale: float,
    skip_prefix: int,
    score: str,
    post_scale: float,
    gate_form: str,
    gate_activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return attention.empty_gradients(seeds, k, v, gate)


def _validate(bound: Bound) -> None:
    checks.check_offsets_content(OP, "offsets", bound["offsets"], bound["k"].shape[0])


def _flops(bound: Bound) -> int:
    seeds, k, v = bound["seeds"], bound["k"], bound["v"]
    rows = bound["offsets"].shape[0] - 1
    pairs = attention.row_pairs(bound["offsets"], k.shape[0], seeds.shape[0], rows * seeds.shape[0])
    return attention.attention_flops(pairs, seeds.shape[1], seeds.shape[2], (k if v is None else v).shape[2])


_op = RegisteredOp(
    OP,
    forward_fake,
    backward_fake,
    reference.pma_pooling,
    differentiable=("seeds", "k", "v", "gate", "residual"),
    extras=("lse", "attn_out"),
    validate=_validate,
    rows_mask=lambda bound: None,
    flops=_flops,
    backward_over_forward=attention.BACKWARD_OVER_FORWARD,
    keeps=attention.keeps_attn_out,
)


@over_shards("B M H Dv", seeds="M H D", k="T Hk D", v="T Hk Dv")
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
            ``A = post_scale * sum_t act(scale * <s, k_t>) v_t``.
        post_scale: factor of the sum for the scores other than softmax.
        gate: anything that broadcasts to the output ``[B, M, H, Dv]``; its gradient is summed over the broadcast axes.
        gate_form: ``"multiply"``: ``G = A * act(gate)``; ``"self"``: ``G = act(A * gate)`` (InterFormer's equation 10).
        gate_activation: ``"sigmoid"``, ``"tanh"``, ``"silu"`` or ``"identity"``.
        residual: added to the result; anything that broadcasts to it, as the gate does.
        return_lse: also return the log-sum-exp of each query's scores (softmax only); it has no gradient
            yet, and a backward that would need one raises an error: use ``lse.detach()``.
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
    seeds, k, v, gate, residual = autocast(seeds, k, v, gate, residual)
    checks.check_floats(OP, "k", {"seeds": seeds, "k": k, "v": v, "gate": gate, "residual": residual})
    rows = checks.check_offsets(OP, "offsets", offsets, k.device)
    axes = checks.Axes(OP)
    axes.bind("k", k, ("T", "Hk", "D"))
    axes.bind("seeds", seeds, ("M", "H", "D"))
    if v is None:
        axes.sizes["Dv"] = axes["D"]
    else:
        axes.bind("v", v, ("T", "Hk", "Dv"))
    checks.check_heads(OP, axes)
    shape = (rows, axes["M"], axes["H"], axes["Dv"])
    residual = checks.check_epilogue(OP, gate, gate_form, gate_activation, residual, shape)
    skip_prefix = checks.check_count(OP, "skip_prefix", skip_prefix)
    factor, with_lse = checks.check_score(OP, score, post_scale, return_lse)
    scale = checks.default_scale(OP, scale, axes["D"])
    name = checks.backend_name(OP, backend)
    keep = attention.backward_reads_attn_out(OP, name, k, v, gate, score)
    keep = keep and wants_gradients(seeds, k, v, gate, residual)
    options = scale, skip_prefix, score, factor, gate_form, gate_activation, keep, name
    out, lse, _ = _op(seeds, k, v, offsets, gate, residual, *options, shows_lse=with_lse)
    return (out, lse) if with_lse else out
