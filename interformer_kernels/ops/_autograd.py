"""Autograd of the registered halves: one `autograd.Function`, which joins them for every caller.

Public functions call it themselves, which costs half of what an autograd kernel of the op does. Bare calls of the
halves, as exported and traced programs make them, reach it by their autograd kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad

from interformer_kernels import reference
from interformer_kernels.ops._spec import PLAIN_TENSORS, Call, OpSpec

if TYPE_CHECKING:
    from interformer_kernels.ops._registered import RegisteredOp

OPS: dict[str, RegisteredOp] = {}
LIBRARY = torch.library.Library("interformer_kernels", "DEF")


def wants_gradients(arguments: Iterable[Any]) -> bool:
    """Whether autograd will ask for a backward of a call with these arguments."""
    if torch.is_grad_enabled():
        for x in arguments:
            if isinstance(x, Tensor) and _requires_grad(x):
                return True
    return False


def _requires_grad(x: Tensor) -> bool:
    """Inside `vmap` a tensor does not say so of the one that it stands for, whose gradient may be asked for later."""
    if x.requires_grad or torch.compiler.is_compiling() or not torch._C._functorch.is_batchedtensor(x):
        return x.requires_grad
    return _requires_grad(torch._C._functorch.get_unwrapped(x))


def _has_tangent(x: Any) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def refuse_tangents(name: str, arguments: Iterable[Any]) -> None:
    """Refuse forward-mode differentiation, which no op has."""
    if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in arguments):
        raise NotImplementedError(f"{name} has no forward-mode derivative (jvp); use reverse mode (vjp, grad)")


class Half(NamedTuple):
    """One of the two registered ops."""

    op: Any  # in PyTorch's registry
    run: Callable[..., Any]  # its implementation
    tensors: Callable[[Sequence[Any]], tuple[Any, ...]]  # those among its arguments, or None in their places


def run(half: Half, args: Sequence[Any]) -> Any:
    """Call a registered half whose gradients are seen to, past its autograd kernel, which would be a hop in Python.

    Where nothing watches the dispatcher, its implementation is called at once: the way there costs as much as a small
    call. Inside a transform of `torch.func` the autograd kernel is needed: an outer level may want what this one does
    not.
    """
    if torch._C._are_functorch_transforms_active():
        return half.op(*args)
    if are_plain(half.tensors(args)):
        return _run_plain(half, args)
    return _below(half.op, args)


def _run_plain(half: Half, args: Sequence[Any]) -> Any:
    """The same where no transform of `torch.func` is at work, and all tensors are plain."""
    return half.run(*args) if _unwatched() else _below(half.op, args)


def _below(half: Any, args: Iterable[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return half(*args)


def is_eager() -> bool:
    """Whether a call is a plain eager one: no mode, tracer, profiler, transform or autocast would change it."""
    return (
        _unwatched()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def _unwatched() -> bool:
    """Whether no mode, tracer or profiler would see the call of an op."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
        or torch.compiler.is_compiling()
    )


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the dispatcher would hand all tensors on as they are."""
    for x in tensors:
        # A loop: a generator would double the time.
        if x is not None and (
            type(x) not in PLAIN_TENSORS or x.is_neg() or not (x.is_cuda or x.is_cpu) or is_functorch_wrapped_tensor(x)
        ):
            return False
    return True


class Joined(torch.autograd.Function):
    """The two halves of an op as one differentiable call.

    Its arguments are the registered op's name; whether the caller hands on the log-sum-exp, which then is
    differentiable, too; the arguments of the forward, without the differentiable ones; and those. Few arguments make
    this function cheap: autograd looks at each of them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, shows_lse: bool, rest: tuple[Any, ...], *inputs: Tensor | None) -> tuple[Tensor, ...]:
        op = OPS[name]
        outputs = run(op.forward, op.spec.filled(rest, inputs))
        return outputs if op.spec.saved else (outputs,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        name, shows_lse, rest, *values = inputs
        save(ctx, OPS[name].spec, shows_lse, OPS[name].spec.filled(rest, values), output)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        name, options, names = ctx.kept
        op = OPS[name]
        grad_lse = grads[0] if grads else None
        if grad_out is None and grad_lse is None:
            return (None,) * (3 + len(op.spec.differentiable))
        kept = op.spec.restored(ctx.saved_tensors, options)
        if grad_out is None:
            call = op.spec.call._make(kept[len(op.spec.saved) :])
            grad_out = op.spec.lead(call).new_zeros(call.out_shape())
        args = (grad_out, *([grad_lse] if op.spec.has_lse else []), *kept, *names)
        needed = ctx.needs_input_grad[3:]
        computed = gradients(op, args, needed)
        return None, None, None, *(grad if need else None for grad, need in zip(computed, needed, strict=True))


class _JoinedPlain(torch.autograd.Function):
    """The same for plain tensors where no transform of `torch.func` is at work.

    Its third argument has those of the forward, all of them: they need not be put together again.
    """

    backward = Joined.backward

    @staticmethod
    def forward(ctx: Any, name: str, shows_lse: bool, args: Sequence[Any], *inputs: Tensor | None) -> Any:
        op = OPS[name]
        outputs = _run_plain(op.forward, args)
        outputs = outputs if op.spec.saved else (outputs,)
        save(ctx, op.spec, shows_lse, args, outputs)
        return outputs


def save(ctx: Any, spec: OpSpec, shows_lse: bool, args: Sequence[Any], outputs: tuple[Tensor, ...]) -> None:
    """Keep what `backward` reads of the arguments and outputs of a forward."""
    kept = (*outputs[1:], *args[: len(spec.names)])
    ctx.save_for_backward(*spec.saved_tensors(kept))
    ctx.kept = spec.name, spec.saved_options(kept), args[-2:]
    ctx.mark_non_differentiable(*(x for x in outputs[2 if shows_lse else 1 :] if x is not None))
    ctx.set_materialize_grads(False)


# `Function.apply` binds its arguments by `inspect.signature`, which takes longer than a small call of an op.
_apply: Any = super(torch.autograd.Function, Joined).apply
_apply_plain: Any = super(torch.autograd.Function, _JoinedPlain).apply


def join(op: RegisteredOp, shows_lse: bool, args: list[Any], inputs: list[Tensor | None]) -> tuple[Tensor, ...]:
    """`Joined` of a call of `<name>_fwd` with these arguments, of which `inputs` are differentiable."""
    outputs: tuple[Tensor, ...]
    transformed = torch._C._are_functorch_transforms_active()
    if not transformed and are_plain(op.forward.tensors(args)):
        outputs = _apply_plain(op.spec.name, shows_lse, args, *inputs)
    else:
        joined = (op.spec.name, shows_lse, op.spec.without_inputs(args), *inputs)
        outputs = Joined.apply(*joined) if transformed else _apply(*unwrap_dead_wrappers(joined))  # type: ignore[no-untyped-call]
    return outputs


def gradients(op: RegisteredOp, args: tuple[Any, ...], needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The needed gradients, of a call of `<name>_bwd` with these arguments; through the reference where they shall be
    differentiable themselves."""
    spec, grad_out = op.spec, args[0]
    first = spec.outputs + len(spec.saved)
    of_outputs, saved, others = args[: spec.outputs], args[spec.outputs : first], args[first:]
    grads = None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        call, given = spec.backward_call(args)
        wanted = [name for name, need in zip(spec.gradients, needed, strict=False) if need]
        # Views: two arguments may be one tensor, or one made from the other; each gets the gradient of its own place.
        leaves = {name: getattr(call, name).view_as(getattr(call, name)) for name in wanted}
        # Where nobody records, as when torch.func.vjp has left its level, the views do not ask for gradients either.
        if wants_gradients(leaves.values()):
            by_name = op.reference_gradients(call._replace(**leaves), given, tuple(leaves), create_graph=True)
            grads = tuple(by_name.get(name) for name in spec.gradients)
    if grads is None:
        grads = op.eager_backward(args)
    if grads is None:
        # An eager call keeps no outputs that its backward does not read; the op takes an empty tensor for each.
        saved = tuple(grad_out.new_empty(0) if x is None else x for x in saved)
        results = run(op.backward, (*of_outputs, *saved, *others))
        grads = results if len(spec.gradients) > 1 else (results,)
    if not spec.has_residual:
        return grads
    return *grads, _residual_gradient(spec.backward_call(args)[0], grad_out) if needed[-1] else None


def _residual_gradient(call: Call, grad_out: Tensor) -> Tensor:
    """The output's own gradient, zero on the tail."""
    offsets = call.out_offsets()
    if offsets is None:
        return grad_out
    inside = reference.inside_rows(offsets, grad_out.shape[0])
    return grad_out.where(inside.view(-1, *[1] * (grad_out.dim() - 1)), 0)


# ---------------------------------------------------------------- bare calls of the halves


class _AtLevel(torch.autograd.function._SingleLevelFunction):
    """`Joined` inside an autograd kernel, where `torch.func` has chosen a level already, or is not at work."""

    setup_context = Joined.setup_context
    backward = Joined.backward

    @staticmethod
    def forward(name: str, shows_lse: bool, rest: tuple[Any, ...], *inputs: Tensor | None) -> tuple[Tensor, ...]:
        op = OPS[name]
        with torch.enable_grad():  # for the levels outside of this one
            outputs = _below(op.forward_op, op.spec.filled(rest, inputs))
        return outputs if op.spec.saved else (outputs,)


def register(op: RegisteredOp) -> None:
    """Give both halves of an op their autograd kernels."""
    OPS[op.spec.name] = op
    LIBRARY.impl(f"{op.spec.name}_fwd", lambda *args: _forward_kernel(op, args), "Autograd")
    LIBRARY.impl(f"{op.spec.name}_bwd", lambda *args: _backward_kernel(op, args), "Autograd")


def _forward_kernel(op: RegisteredOp, args: tuple[Any, ...]) -> Any:
    """A program that was traced without gradients in mind did not ask for A: it is kept here, and not returned."""
    spec, public = op.spec, args[-2]
    refuse_tangents(public, args)
    if not wants_gradients(args):
        return _below(op.forward_op, args)
    call, others = spec.forward_call(args)
    for name, x in zip(spec.names, call, strict=True):
        if isinstance(x, Tensor) and x.requires_grad and name not in spec.gradients:
            raise ValueError(f"{public}: {name} must not require gradients, which it does not get; detach it")
    asked = others.get("keep_attn_out", True)
    if not asked:
        others["keep_attn_out"] = spec.reads_attn_out(others["op"], others["backend"], call)
    inputs = [getattr(call, name) for name in spec.gradients]
    if spec.has_residual:
        inputs.append(others["residual"])
    rest = spec.without_inputs([*call, *others.values()])
    with enable_single_level_autograd_function():
        outputs = _AtLevel.apply(spec.name, spec.shows_lse(call), rest, *inputs)  # type: ignore[attr-defined]
    if not spec.saved:
        return outputs[0]
    return outputs if asked else (*outputs[:2], outputs[2].new_empty(0))


def _backward_kernel(op: RegisteredOp, args: tuple[Any, ...]) -> Any:
    """Gradients that are to be differentiated again come from the reference."""
    spec, public = op.spec, args[-2]
    refuse_tangents(public, args)
    if not wants_gradients(args):
        return _below(op.backward_op, args)
    call, others = spec.backward_call(args)
    if is_fake(others["grad_out"]):
        # A compiled graph has no lengths of rows, which the reference's gradients need.
        raise NotImplementedError(f"{public}: second derivatives cannot be compiled; take them in eager mode")
    leaves = {name: _leaf(x) for name in spec.gradients if (x := getattr(call, name)) is not None}
    grads = op.reference_gradients(call._replace(**leaves), others, tuple(leaves), create_graph=True)
    return op.gradient_outputs(call, grads)


def _leaf(x: Tensor) -> Tensor:
    """A place of its own to differentiate by, that hangs on `x` where `x` itself is to be differentiated."""
    if x.requires_grad:
        return x.view_as(x)
    with enable_inplace_requires_grad(True):  # torch.func would refuse it
        return x.detach().requires_grad_()
