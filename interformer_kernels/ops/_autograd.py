"""Autograd of the registered halves: one `autograd.Function`, which joins them for every caller.

Public functions call it themselves, which costs half of what an autograd kernel of the op does. Bare calls of the
halves, as exported and traced programs make them, reach it by their autograd kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from interformer_kernels.ops._registered import RegisteredOp

Bound = dict[str, Any]

OPS: dict[str, RegisteredOp] = {}
LIBRARY = torch.library.Library("interformer_kernels", "DEF")


def wants_gradients(*arguments: Any) -> bool:
    """Whether autograd will ask for a backward of a call with these arguments."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and _requires_grad(x) for x in arguments)


def _requires_grad(x: Tensor) -> bool:
    """Inside `vmap` a tensor does not say so of the one that it stands for, whose gradient may be asked for later."""
    if x.requires_grad or torch.compiler.is_compiling() or not torch._C._functorch.is_batchedtensor(x):
        return x.requires_grad
    return _requires_grad(torch._C._functorch.get_unwrapped(x))


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    """Forward-mode differentiation is refused: no op has it."""
    if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in arguments):
        raise NotImplementedError(f"{name} has no forward-mode derivative (jvp); use reverse mode (vjp, grad)")


def run(half: Any, *args: Any) -> Any:
    """Call a registered half whose gradients are seen to: past its autograd kernel, which would be a hop in Python.

    Inside a transform of `torch.func` that kernel is needed: an outer level may want what this one does not.
    """
    if torch._C._are_functorch_transforms_active():
        return half(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return half(*args)


class Joined(torch.autograd.Function):
    """The two halves of an op as one differentiable call.

    `shows_lse` says whether the caller hands on the log-sum-exp, whose gradient somebody might then ask for.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, shows_lse: bool, *args: Any) -> tuple[Tensor, ...]:
        op = OPS[name]
        outputs = run(op.forward_op, *args)
        return outputs if op.extras else (outputs,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        op = OPS[inputs[0]]
        bound = dict(zip(op.forward_names, inputs[2:], strict=True))
        bound.update(zip(op.extras, output[1:], strict=True))
        kept = [name for name in op.backward_names if name != "grad_out"]
        ctx.op_name = op.name
        ctx.names = [n for n in kept if isinstance(bound[n], Tensor)]
        ctx.options = {n: bound[n] for n in kept if not isinstance(bound[n], Tensor)}
        ctx.save_for_backward(*(bound[n] for n in ctx.names))
        ctx.mark_non_differentiable(*output[2 if inputs[1] else 1 :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        op = OPS[ctx.op_name]
        bound = {**dict(zip(ctx.names, ctx.saved_tensors, strict=True)), **ctx.options, "grad_out": grad_out}
        if grads and grads[0] is not None:
            bound["lse"] = _without_lse_gradient(op.name, bound["lse"], grads[0])
        if grad_out is None:
            return (None,) * (2 + len(op.forward_names))
        needed = dict(zip(op.forward_names, ctx.needs_input_grad[2:], strict=True))
        found = _gradients(op, bound, tuple(name for name in op.differentiable if needed[name]))
        return (None, None, *(found.get(name) if needed[name] else None for name in op.forward_names))


def _gradients(op: RegisteredOp, bound: Bound, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradients of the named inputs; through the reference where they shall be differentiable themselves."""
    names = tuple(name for name in op.differentiable if name != "residual")
    leaves = {}
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # Views: two arguments may be one tensor, or one made from the other; each gets the gradient of its own place.
        leaves = {n: bound[n].view_as(bound[n]) for n in names if n in wanted}
    # Where nobody records, as when torch.func.vjp has left its level, the views do not ask for gradients either.
    if wants_gradients(*leaves.values()):
        found = op.reference_gradients({**bound, **leaves}, tuple(leaves), create_graph=True)
    else:
        results = run(op.backward_op, *(bound[name] for name in op.backward_names))
        found = dict(zip(names, results if len(names) > 1 else (results,), strict=True))
    if "residual" in wanted:
        inside = op.rows_mask(bound)
        grad = bound["grad_out"]
        found["residual"] = grad if inside is None else grad.where(inside.view(-1, *[1] * (grad.dim() - 1)), 0)
    return found


# ---------------------------------------------------------------- the log-sum-exp, which has no gradient yet


def _without_lse_gradient(name: str, lse: Tensor, grad_lse: Tensor) -> Tensor:
    """`lse` itself, for the backward, after a gradient of it other than zero has been refused."""
    wait = not (torch.compiler.is_compiling() or is_fake(grad_lse))
    found: Tensor = torch.ops.interformer_kernels.without_lse_gradient.default(lse, grad_lse, name, wait)
    return found


def _check_lse_gradient(lse: Tensor, grad_lse: Tensor, name: str, wait: bool) -> Tensor:
    """The gradient's content decides, for compiled programs and checkpoints pass zeros where nobody asks for one.

    The result is a copy of `lse`, so that no compiler drops the check: the backward reads it. Compiled programs do not
    wait for a GPU.
    """
    message = f"{name}: lse is not differentiable yet; use lse.detach()"
    if wait or grad_lse.device.type == "cpu":
        if bool(grad_lse.any()):
            raise NotImplementedError(message)
    else:
        torch._assert_async(~grad_lse.any(), message)
    return lse.clone()


LIBRARY.define(
    "without_lse_gradient(Tensor lse, Tensor grad_lse, str name, bool wait) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("without_lse_gradient", _check_lse_gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "interformer_kernels::without_lse_gradient", lambda lse, grad_lse, name, wait: lse.new_empty(lse.shape), lib=LIBRARY
)


# ---------------------------------------------------------------- bare calls of the halves


class _AtLevel(torch.autograd.function._SingleLevelFunction):
    """`Joined` inside an autograd kernel, where `torch.func` has chosen a level already, or is not at work."""

    setup_context = Joined.setup_context
    backward = Joined.backward

    @staticmethod
    def forward(name: str, shows_lse: bool, *args: Any) -> tuple[Tensor, ...]:
        op = OPS[name]
        with torch.enable_grad():  # for the levels outside of this one
            outputs = _below(op.forward_op, args)
        return outputs if op.extras else (outputs,)


def _below(half: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return half(*args)


def register(op: RegisteredOp) -> None:
    """Give both halves of an op their autograd kernels."""
    LIBRARY.impl(f"{op.name}_fwd", lambda *args: _forward_kernel(op, args), "Autograd")
    LIBRARY.impl(f"{op.name}_bwd", lambda *args: _backward_kernel(op, args), "Autograd")


def _forward_kernel(op: RegisteredOp, args: tuple[Any, ...]) -> Any:
    """A program that was traced without gradients in mind did not ask for A: it is kept here, and not returned."""
    refuse_tangents(op.name, args)
    if not wants_gradients(*args):
        return _below(op.forward_op, args)
    bound = dict(zip(op.forward_names, args, strict=True))
    for name, x in bound.items():
        if isinstance(x, Tensor) and x.requires_grad and name not in op.differentiable:
            raise ValueError(f"{op.name}: {name} must not require gradients, which it does not get; detach it")
    asked = bound.get("keep_attn_out", True)
    if not asked:
        bound["keep_attn_out"] = op.keeps(op.name, bound)
    with enable_single_level_autograd_function():
        outputs = _AtLevel.apply(op.name, True, *bound.values())  # type: ignore[attr-defined]
    if not op.extras:
        return outputs[0]
    return outputs if asked else (*outputs[:2], outputs[2].new_empty(0))


def _backward_kernel(op: RegisteredOp, args: tuple[Any, ...]) -> Any:
    """Gradients that are to be differentiated again come from the reference."""
    refuse_tangents(op.name, args)
    if not wants_gradients(*args):
        return _below(op.backward_op, args)
    bound = dict(zip(op.backward_names, args, strict=True))
    if is_fake(bound["grad_out"]):
        raise NotImplementedError(f"{op.name}: second derivatives cannot be compiled; take them in eager mode")
    names = tuple(name for name in op.differentiable if name != "residual")
    leaves = {n: _leaf(bound[n]) for n in names if bound[n] is not None}
    grads = op.reference_gradients({**bound, **leaves}, tuple(leaves), create_graph=True)
    found = tuple(grads[n] if n in grads else bound["grad_out"].new_empty(0) for n in names)
    return found[0] if len(found) == 1 else found


def _leaf(x: Tensor) -> Tensor:
    """A place of its own to differentiate by, that hangs on `x` where `x` itself is to be differentiated."""
    if x.requires_grad:
        return x.view_as(x)
    with enable_inplace_requires_grad(True):  # torch.func would refuse it
        return x.detach().requires_grad_()
