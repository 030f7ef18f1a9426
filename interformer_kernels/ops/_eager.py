"""Eager calls of attention on the CPU: one call of the native module, and one of autograd.

Around a small row the long way (`_public.py`, `_registered.py`, `_autograd.py`) takes several times as long as the
kernel. Here the native module asks all of its questions itself, and declines whatever it cannot serve as it is; nothing
is refused here, and the long way has the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import _backend
from interformer_kernels import _checks as checks
from interformer_kernels._calls import AttentionCall
from interformer_kernels._launch.tensors import accumulation_dtype
from interformer_kernels.ops import _autograd as autograd
from interformer_kernels.ops._public import PublicOp


def attention(
    public: PublicOp, call: AttentionCall, residual: Tensor | None, backend: str | None, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor] | None:
    """The public function's result for arguments as they came, none of them checked; None where it is declined."""
    if torch.compiler.is_compiling():
        return None
    module = _backend.native()
    if (
        module is None
        or not autograd.is_eager()
        or not (backend is None or (type(backend) is str and backend == "cpu"))
    ):
        return None
    if (call.v is None and "v" in public.required) or (return_lse is not False and return_lse is not True):
        return None
    inputs = (*public.spec.inputs(call), residual)
    records = autograd.wants_gradients(inputs)
    outputs = module.eager_attention_forward(
        call, residual, return_lse, records and call.gate is not None, checks.validates_cpu(), torch.get_num_threads()
    )
    if outputs is None:
        return None
    _backend.choose(public.name, "cpu", call.k.dtype, call.k.shape[2])  # for its log
    if records:
        outputs = _apply("attention", return_lse, (call, outputs, (public.name, backend or "")), *inputs)
    out: Tensor | tuple[Tensor, Tensor] = outputs[:2] if return_lse else outputs[0]
    return out


def forward(args: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """The outputs of `attention_fwd`, of its arguments, as compiled programs call it; None where it is declined."""
    module = _backend.native()
    *fields, residual, keeps_attn_out, name, backend = args
    call = AttentionCall._make(fields)
    if module is None or backend not in ("", "cpu") or not autograd.is_eager():
        return None
    if call.positions_k is not None:
        return None
    outputs = module.eager_attention_forward(
        call, residual, call.score == "softmax", keeps_attn_out, checks.validates_cpu(), torch.get_num_threads()
    )
    if outputs is None:
        return None
    _backend.choose(name, "cpu", call.k.dtype, call.k.shape[2])  # for its log
    out, *kept = outputs
    lse, attn_out = (out.new_empty(0, dtype=accumulation_dtype(call.k.dtype)) if x is None else x for x in kept)
    return out, lse, attn_out


def backward(args: Sequence[Any]) -> tuple[Tensor | None, ...] | None:
    """The gradients of the differentiable fields, of the arguments of `attention_bwd`; None where it is declined."""
    if torch.compiler.is_compiling():
        return None
    module, dtype = _backend.native(), args[0].dtype
    if module is None or args[-1] not in ("", "cpu") or not autograd.is_eager():
        return None
    grad_out, grad_lse, _, attn_out, *call = args[:-2]
    grads = module.eager_attention_backward(tuple(call), grad_out, attn_out, grad_lse, torch.get_num_threads())
    if grads is None:
        return None
    grads = tuple(x if x is None or x.dtype is dtype else x.to(dtype) for x in grads)  # sums are wider
    return *grads, None, None, None  # calls with tables are declined


class _Recorded(torch.autograd.Function):
    """The node in autograd's graph of an eager call whose outputs are there already."""

    backward = autograd.Joined.backward

    @staticmethod
    def forward(ctx: Any, name: str, shows_lse: bool, made: tuple[Any, ...], *inputs: Tensor | None) -> Any:
        call, outputs, names = made
        fields = [*call]
        if call.scale is None:
            fields[_SCALE] = call.k.shape[2] ** -0.5
        autograd.save(ctx, autograd.OPS[name].spec, shows_lse, (*fields, *names), outputs)
        return outputs[: 1 + shows_lse]


_SCALE = AttentionCall._fields.index("scale")
_apply: Any = super(torch.autograd.Function, _Recorded).apply  # as in `_autograd.py`
