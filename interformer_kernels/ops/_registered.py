"""How a declared operation becomes two registered torch ops and one differentiable call.

`<name>_fwd` and `<name>_bwd` are opaque to the compiler: their implementations look up the backend with real tensors in
hand. An `autograd.Function` outside joins them (`_autograd.py`), which costs half of what autograd registered on the op
does (measured on a toy op, torch 2.13, forward without gradients: 38 us bare, 89 us registered).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import _backend
from interformer_kernels import _checks as checks
from interformer_kernels._launch.tensors import accumulation_dtype
from interformer_kernels.ops import _autograd as autograd
from interformer_kernels.ops import _flops
from interformer_kernels.ops._autograd import LIBRARY, wants_gradients
from interformer_kernels.ops._public import PublicOp, public_op
from interformer_kernels.ops._spec import Call, OpSpec


class RegisteredOp:
    """The two halves of an op in PyTorch's registry, from its declaration, and the call that joins them.

    Args:
        spec: the declaration.
        short_forward: outputs of `<name>_fwd` by a shorter way, from its arguments; None where it declines.
        eager_backward: gradients of an eager call by a shorter way; None where it declines.
    """

    def __init__(
        self,
        spec: OpSpec,
        short_forward: Callable[[Sequence[Any]], Any] = lambda args: None,
        eager_backward: Callable[[Sequence[Any]], Any] = lambda args: None,
    ) -> None:
        self.spec, self.short_forward, self.eager_backward = spec, short_forward, eager_backward
        self.forward_op = self._register("fwd", spec.forward_schema, spec.forward_fake, self.run_forward)
        self.backward_op = self._register("bwd", spec.backward_schema, spec.backward_fake, self.run_backward)
        self.forward = autograd.Half(self.forward_op, self.run_forward, spec.forward_tensors)
        self.backward = autograd.Half(self.backward_op, self.run_backward, spec.backward_tensors)
        _flops.register(self._packet("fwd"), self._forward_flops)
        _flops.register(self._packet("bwd"), self._backward_flops)
        autograd.register(self)

    def _packet(self, half: str) -> Any:
        return getattr(torch.ops.interformer_kernels, f"{self.spec.name}_{half}")

    def _register(self, half: str, schema: str, fake: Callable[..., Any], run: Callable[..., Any]) -> Any:
        name = f"{self.spec.name}_{half}"
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"interformer_kernels::{name}", fake, lib=LIBRARY)
        return self._packet(half).default

    def _forward_flops(self, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return self.spec.flops(self.spec.forward_call((*args, *kwargs.values()))[0])

    def _backward_flops(self, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        call, _ = self.spec.backward_call((*args, *kwargs.values()))
        return int(self.spec.flops(call) * self.spec.backward_over_forward)

    # -------------------------------------------------------- implementations, with real tensors in hand

    def run_forward(self, *args: Any) -> Any:
        """The implementation of `<name>_fwd`."""
        short = self.short_forward(args)
        if short is not None:
            return short
        spec = self.spec
        count = len(spec.names)
        call = spec.call._make(args[:count])
        *others, name, backend = args[count:]
        public = public_op(spec, name)
        spec.validate(public, call)
        module = self._kernels(public, call, backend)
        if module is not None:
            return module.forward(call, *others)
        with _autocast_off(spec.lead(call)):
            outputs = self._reference(call, others[0] if spec.has_residual else None)
        dtype = spec.lead(call).dtype
        if isinstance(outputs, Tensor):
            return outputs.to(dtype)
        out, lse, attn_out = outputs
        # No output of an op may be another one.
        kept = attn_out.clone() if attn_out is out else attn_out
        return out.to(dtype), lse, kept if others[-1] else attn_out.new_empty(0)

    def run_backward(self, *args: Any) -> Any:
        """The implementation of `<name>_bwd`."""
        spec = self.spec
        call, others = spec.backward_call(args)
        public, backend = others.pop("op"), others.pop("backend")
        module = self._kernels(public_op(spec, public), call, backend)
        if module is not None:
            return module.backward(call, **others)
        given = {name: x for name in spec.gradients if (x := getattr(call, name)) is not None}
        leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
        with _recording_autograd(), _autocast_off(spec.lead(call)):
            grads = self.reference_gradients(call._replace(**leaves), others, tuple(leaves))
        return self.gradient_outputs(call, grads)

    def gradient_outputs(self, call: Call, grads: dict[str, Tensor]) -> Any:
        """The outputs of `<name>_bwd` from gradients by name, contiguous: an empty one for an input not given."""
        outputs = tuple(
            grads[name].contiguous() if name in grads else self.spec.empty_gradient(call, name)
            for name in self.spec.gradients
        )
        return outputs if len(outputs) > 1 else outputs[0]

    def reference_gradients(
        self, call: Call, given: Mapping[str, Any], names: tuple[str, ...], create_graph: bool = False
    ) -> dict[str, Tensor]:
        """Gradients of the named inputs by automatic differentiation of the reference, from those of the outputs:
        `grad_out` and, where it is asked, `grad_lse` of what is `given`."""
        inputs = [getattr(call, name) for name in names]
        grads_of_outputs = [x for name in ("grad_out", "grad_lse") if (x := given.get(name)) is not None]
        if grads_of_outputs[0].is_meta:
            # The reference reads lengths; shapes alone follow from any dependence on all inputs.
            outputs = [sum(x.sum() for x in inputs).square().expand_as(grad) for grad in grads_of_outputs]
        else:
            result = self._reference(call, None)
            outputs = [result] if isinstance(result, Tensor) else [*result[: len(grads_of_outputs)]]
        grads = torch.autograd.grad(
            outputs, inputs, [grad.to(out.dtype) for out, grad in zip(outputs, grads_of_outputs, strict=True)],
            create_graph=create_graph, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return dict(zip(names, grads, strict=True))

    def _reference(self, call: Call, residual: Tensor | None) -> Any:
        """The reference's outputs, computed in the dtype of accumulation."""
        dtype = accumulation_dtype(self.spec.lead(call).dtype)
        values = {name: x.to(dtype) for name in self.spec.gradients if (x := getattr(call, name)) is not None}
        residuals = (None if residual is None else residual.to(dtype),) if self.spec.has_residual else ()
        return self.spec.reference(call._replace(**values), *residuals)

    def _kernels(self, public: PublicOp, call: Call, backend: str) -> Any:
        lead = self.spec.lead(call)
        name, channels = self.spec.name, self.spec.channels(call)
        device = "cuda" if lead.is_cuda else lead.device.type
        return _backend.kernels(name, public.name, backend, device, lead.dtype, channels)

    # -------------------------------------------------------- the differentiable call

    def __call__(
        self, public: PublicOp, call: Call, residual: Tensor | None, backend: object, return_lse: object = False
    ) -> Any:
        """The output of a checked call, and `lse` if asked; the graph is recorded where gradients are wanted."""
        with_lse = return_lse is not False and checks.check_lse(public.name, call.score, return_lse)
        outputs = self._outputs(public, call, residual, checks.backend_name(public.name, backend), with_lse)
        if with_lse:
            return outputs[:2]
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def _outputs(self, public: PublicOp, call: Call, residual: Tensor | None, backend: str, shows_lse: bool) -> Any:
        spec = self.spec
        inputs = spec.inputs(call)
        if spec.has_residual:
            inputs.append(residual)
        with_gradients = wants_gradients(inputs)
        args = [*call]
        if spec.has_residual:
            args.append(residual)
        if spec.keeps_attn_out:
            args.append(with_gradients and spec.reads_attn_out(public.name, backend, call))
        args += (public.name, backend)
        if torch.compiler.is_compiling():
            # The op's own autograd kernel serves: strict export would keep an autograd.Function as its forward alone.
            return self.forward_op(*args)
        autograd.refuse_tangents(public.name, args)
        if not with_gradients:
            return autograd.run(self.forward, args)
        return autograd.join(self, shows_lse, args, inputs)


@contextlib.contextmanager
def _recording_autograd() -> Iterator[None]:
    """Let autograd record inside an op's implementation, where the dispatcher may have switched it off."""
    key = torch._C.DispatchKey
    exclude = torch._C._SetExcludeDispatchKeyGuard
    with exclude(key.AutogradFunctionality, False), exclude(key.ADInplaceOrView, False), torch.enable_grad():
        yield


def _autocast_off(lead: Tensor) -> Any:
    """Autocast off for the reference, whose arguments already have the dtype it shall compute in."""
    return torch.autocast(lead.device.type, enabled=False)
