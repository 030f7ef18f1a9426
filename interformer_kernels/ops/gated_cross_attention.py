"""Gated cross attention: a few dense or jagged queries of each row attend to all keys of the row."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels import reference
from interformer_kernels.ops import _attention as attention
from interformer_kernels.ops._registered import Bound, RegisteredOp, autocast, wants_gradients
from interformer_kernels.ops._sharding import over_shards

OP = "gated_cross_attention"


def forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor,
    q_offsets: Optional[Tensor],
    gate: Optional[Tensor],
    residual: Optional[Tensor],
    scale: float,
    score: str,
    post_scale: float,
    gate_form: str,
    gate_activation: str,
    keep_attn_out: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return attention.empty_outputs(q, (*q.shape[:-1], v.shape[2]), score, keep_attn_out)


def backward_fake(
    grad_out: Tensor,
    attn_out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor,
    q_offsets: Optional[Tensor],
    gate: Optional[Tensor],
    scale: float,
    score: str,
    post_scale: float,
    gate_form: str,
    gate_activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return attention.empty_gradients(q, k, v, gate)


def _validate(bound: Bound) -> None:
    checks.check_offsets_content(OP, "kv_offsets", bound["kv_offsets"], bound["k"].shape[0])
    if bound["q_offsets"] is not None:
        checks.check_offsets_content(OP, "q_offsets", bound["q_offsets"], bound["q"].shape[0])


def _rows_mask(bound: Bound) -> Tensor | None:
    q_offsets = bound["q_offsets"]
    return None if q_offsets is None else reference.inside_rows(q_offsets, bound["q"].shape[0])


def _flops(bound: Bound) -> int:
    q, k, v, kv_offsets, q_offsets = (bound[name] for name in ("q", "k", "v", "kv_offsets", "q_offsets"))
    dense = q_offsets is None
    queries, total = (q.shape[1], q.shape[0] * q.shape[1]) if dense else (q_offsets, q.shape[0])
    pairs = attention.row_pairs(kv_offsets, k.shape[0], queries, total)
    return attention.attention_flops(pairs, q.shape[-2], q.shape[-1], v.shape[2])


_op = RegisteredOp(
    OP,
    forward_fake,
    backward_fake,
    reference.gated_cross_attention,
    differentiable=("q", "k", "v", "gate", "residual"),
    extras=("lse", "attn_out"),
    validate=_validate,
    rows_mask=_rows_mask,
    flops=_flops,
    backward_over_forward=attention.BACKWARD_OVER_FORWARD,
    keeps=attention.keeps_attn_out,
)


@over_shards("B N H Dv | Tq H Dv", q="B N H D | Tq H D", k="Tk Hk D", v="Tk Hk Dv")
def gated_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor,
    *,
    q_offsets: Tensor | None = None,
    gate: Tensor | None = None,
    gate_form: str = "multiply",
    gate_activation: str = "sigmoid",
    residual: Tensor | None = None,
    scale: float | None = None,
    score: str = "softmax",
    post_scale: float = 1.0,
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
        gate: anything that broadcasts to the output; its gradient is summed over the broadcast axes.
        gate_form: ``"multiply"``: ``G = A * act(gate)``; ``"self"``: ``G = act(A * gate)`` (InterFormer's equation 10).
        gate_activation: ``"sigmoid"``, ``"tanh"``, ``"silu"`` or ``"identity"``.
        residual: added to the result; anything that broadcasts to it, as the gate does.
        scale: factor of the scores; None is ``1/sqrt(D)``.
        score: ``"softmax"``, or ``"identity"``, ``"relu"``, ``"silu"``, ``"gelu"`` (by erf): then
            ``A = post_scale * sum_t act(scale * <q, k_t>) v_t``.
        post_scale: factor of the sum for the scores other than softmax.
        return_lse: also return the log-sum-exp of each query's scores (softmax only); it has no gradient
            yet, and a backward that would need one raises an error: use ``lse.detach()``.
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
    q, k, v, gate, residual = autocast(q, k, v, gate, residual)
    checks.check_floats(OP, "q", {"q": q, "k": k, "v": v, "gate": gate, "residual": residual})
    rows = checks.check_row_offsets(OP, "kv_offsets", kv_offsets, "q_offsets", q_offsets, q.device)
    axes = checks.Axes(OP, B=rows)
    layout = ("B", "N", "H", "D") if q_offsets is None else ("Tq", "H", "D")
    axes.bind("q", q, layout)
    axes.bind("k", k, ("Tk", "Hk", "D"))
    axes.bind("v", v, ("Tk", "Hk", "Dv"))
    checks.check_heads(OP, axes)
    residual = checks.check_epilogue(OP, gate, gate_form, gate_activation, residual, (*q.shape[:-1], axes["Dv"]))
    factor, with_lse = checks.check_score(OP, score, post_scale, return_lse)
    scale = checks.default_scale(OP, scale, axes["D"])
    name = checks.backend_name(OP, backend)
    keep = attention.backward_reads_attn_out(OP, name, k, v, gate, score)
    keep = keep and wants_gradients(q, k, v, gate, residual)
    options = scale, score, factor, gate_form, gate_activation, keep, name
    out, lse, _ = _op(q, k, v, kv_offsets, q_offsets, gate, residual, *options, shows_lse=with_lse)
    return (out, lse) if with_lse else out
