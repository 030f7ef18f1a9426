"""Linear layers of packed tokens with what surrounds them."""

from __future__ import annotations

import torch
from torch import Tensor

from interformer_kernels import _backend, reference
from interformer_kernels._calls import LinearCall, LinearOutputs
from interformer_kernels.ops import _autograd as autograd
from interformer_kernels.ops._public import PublicOp
from interformer_kernels.ops._registered import RegisteredOp
from interformer_kernels.ops._sharding import unsharded
from interformer_kernels.ops._spec import PLAIN_TENSORS, OpSpec


def _check_options(op: PublicOp, call: LinearCall) -> None:
    if call.norm_bias is not None and call.norm_weight is None:
        raise ValueError(f"{op.name}: norm_weight must be given with norm_bias, found None")
    if call.eps < 0:
        raise ValueError(f"{op.name}: eps must be at least 0, found {call.eps}")


def _flops(call: LinearCall) -> int:
    return int(2 * call.x.shape[0] * call.weight.shape[0] * call.weight.shape[1])


LINEAR = OpSpec(
    "fused_linear",
    LinearCall,
    "T F",
    reference=reference.fused_linear,
    validate=lambda op, call: None,
    check_options=_check_options,
    flops=_flops,
    backward_over_forward=2.0,
)
OP = PublicOp("fused_linear", LINEAR)
_registered = RegisteredOp(LINEAR)


def _eager(call: LinearCall, residual: Tensor | None, backend: str | None) -> Tensor | None:
    """The output of a plain eager call without gradients, by one native call; None where it is declined.

    The native module asks all questions of the way below, where a small call spends most of its time.
    """
    if torch.compiler.is_compiling() or not (backend is None or (type(backend) is str and backend == "cpu")):
        return None
    module, x, weight = _backend.native(), call.x, call.weight
    if module is None or type(x) not in PLAIN_TENSORS or type(weight) not in PLAIN_TENSORS:
        return None
    if x.dim() != 2 or weight.dim() != 2 or not autograd.is_eager():
        return None
    if autograd.wants_gradients((*call[:6], residual)):
        return None
    out = x.new_empty((x.shape[0], weight.shape[0]))
    outputs = LinearOutputs(residual, out)
    if not module.eager_fused_linear_forward(call, outputs, torch.get_num_threads()):
        return None
    _backend.choose(OP.name, "cpu", x.dtype)  # for its log
    return out


@unsharded(OP)
def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "identity",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""A linear layer of every token behind layer norm, activation and gate, in one pass over the tokens.

    .. math:: y_t = (act(norm(x_t)) \odot gate_t)\, W^\top + bias \;(+\; residual_t)

    In PyTorch::

        n = x if norm_weight is None else F.layer_norm(x, (E,), norm_weight, norm_bias, eps)
        n = act(n) if gate is None else act(n) * gate
        y = F.linear(n, weight, bias)
        y = y if residual is None else y + residual

    Nothing of it but ``y`` is written to memory, and the backward reads the inputs alone: it computes the normalised
    tokens again. With ``T`` tokens, ``E`` input and ``F`` output channels:

    Args:
        x: tokens ``[T, E]``.
        weight: ``[F, E]``, as ``torch.nn.Linear`` has it.
        bias: ``[F]``.
        norm_weight: ``[E]``, the weight of a layer norm; None is no norm.
        norm_bias: ``[E]``, its bias; None is zero.
        eps: added to the variance; at least 0.
        activation: ``"identity"``, ``"relu"``, ``"silu"`` or ``"gelu"`` (by erf), before the gate.
        gate: ``[T, E]``, factors of the product's inputs.
        residual: added to the result; anything that broadcasts to ``[T, F]``.
        backend: ``"reference"`` or ``"cpu"``; None takes ``"cpu"`` for CPU tensors, and for all others the reference:
            on a GPU that is the PyTorch above.

    Returns:
        ``[T, F]`` in the inputs' dtype. ``T == 0`` is an ordinary input. A token's result does not depend on the
        others, nor on their number.

    Shapes and dtypes: float32, float64, bfloat16, float16; all floating tensors share one dtype and device, or are cast
    to the autocast dtype under ``torch.autocast``. Sums are float32 (float64 for float64). The weight should fit into
    the caches of a core: a large one is read again for every block of tokens.

    Raises:
        TypeError: an argument is of the wrong kind or dtype, or a DTensor.
        ValueError: a shape, value or device is wrong.
        RuntimeError: the named backend cannot serve the call; ``"triton"`` and ``"cuda"`` have no kernel for it.

    Source: the fused layers of Transformer Engine (``LayerNormLinear``); its product is MaskNet's (Wang et al., 2021).
    """
    call = LinearCall(x, weight, bias, norm_weight, norm_bias, gate, eps, activation)
    served = _eager(call, residual, backend)
    if served is not None:
        return served
    call, residual = OP.checked(call, residual)
    out: Tensor = _registered(OP, call, residual, backend)
    return out
