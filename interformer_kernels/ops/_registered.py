"""How an operation becomes two registered torch ops and one differentiable call; what its halves share lives here.

`<op>_fwd` and `<op>_bwd` are opaque to the compiler: their implementation looks up the backend with real tensors in
hand. An `autograd.Function` outside joins them, which costs half of what autograd registered on the op does
(measured on a toy op, torch 2.13, forward without gradients: 38 us bare, 89 us registered); `_autograd.py` has both.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import _backend
from interformer_kernels.ops import _autograd as autograd
from interformer_kernels.ops import _flops
from interformer_kernels.ops._autograd import LIBRARY, Bound, wants_gradients

__all__ = ["Bound", "RegisteredOp", "autocast", "exact_dtype", "wants_gradients"]


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulation: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Floating tensors cast to the autocast dtype where autocast is on (float64 is left, as PyTorch does)."""
    device = next((x.device.type for x in tensors if isinstance(x, Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):  # of tensors without contents there is no autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in eligible else x for x in tensors)


class RegisteredOp:
    """One operation: its registered halves, the function that joins them, and its reference.

    `forward_fake` and `backward_fake` carry the schema in their annotations (the real implementations share it) and
    allocate the outputs. The first output is the differentiable one; further outputs (`extras`) are kept for the
    backward (of attention; `keeps` says of a call whether its backward reads A). `backward_fake` takes `grad_out`, then
    extras and forward arguments by their names, and returns one gradient for each of `differentiable` but a `residual`,
    which is added last: its gradient is the output's own.
    """

    def __init__(
        self,
        name: str,
        forward_fake: Callable[..., Any],
        backward_fake: Callable[..., Any],
        reference: Callable[..., Any],
        *,
        differentiable: Sequence[str],
        extras: Sequence[str] = (),
        validate: Callable[[Bound], None],
        rows_mask: Callable[[Bound], Tensor | None],
        flops: Callable[[Bound], int],
        backward_over_forward: float,
        keeps: Callable[[str, Bound], bool] = lambda name, bound: False,
    ) -> None:
        self.name = name
        self.reference = reference
        self.differentiable = tuple(differentiable)
        self.extras = tuple(extras)
        self.validate = validate
        self.rows_mask = rows_mask
        self.keeps = keeps
        self.forward_names = tuple(inspect.signature(forward_fake).parameters)
        self.backward_names = tuple(inspect.signature(backward_fake).parameters)
        self.reference_names = tuple(inspect.signature(reference).parameters)
        self.forward_fake, self.backward_fake = forward_fake, backward_fake
        self.forward_op = self._register(f"{name}_fwd", forward_fake, self._run_forward)
        self.backward_op = self._register(f"{name}_bwd", backward_fake, self._run_backward)
        self._register_flops(flops, backward_over_forward)
        autograd.OPS[name] = self
        autograd.register(self)

    def _register(self, name: str, fake: Callable[..., Any], run: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(fake, mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"interformer_kernels::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.interformer_kernels, name).default

    def _register_flops(self, flops: Callable[[Bound], int], backward_over_forward: float) -> None:
        def forward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            return flops({**dict(zip(self.forward_names, args, strict=False)), **kwargs})

        def backward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            bound = {**dict(zip(self.backward_names, args, strict=False)), **kwargs}
            return int(flops(bound) * backward_over_forward)

        for half, formula in (("fwd", forward), ("bwd", backward)):
            _flops.register(getattr(torch.ops.interformer_kernels, f"{self.name}_{half}"), formula)

    # -------------------------------------------------------- implementations, with real tensors in hand

    def _run_forward(self, *args: Any) -> Any:
        bound = dict(zip(self.forward_names, args, strict=True))
        self.validate(bound)
        module = self._launcher(bound)
        if module is not None:
            return module.forward(*args[:-1])
        with _plain_autocast_off(bound):
            outputs = self.reference(*self._reference_arguments(bound))
        if isinstance(outputs, Tensor):
            return outputs.to(self._lead(bound).dtype)
        out, lse, attn_out = outputs
        # No output of an op may be another one.
        kept = attn_out.clone() if attn_out is out else attn_out
        return out.to(self._lead(bound).dtype), lse, kept if bound["keep_attn_out"] else attn_out.new_empty(0)

    def _run_backward(self, *args: Any) -> Any:
        bound = dict(zip(self.backward_names, args, strict=True))
        module = self._launcher(bound)
        if module is not None:
            return module.backward(*args[:-1])
        leaves = {
            name: x.detach().requires_grad_() for name in self.differentiable if (x := bound.get(name)) is not None
        }
        with _recording_autograd(), _plain_autocast_off(bound):
            grads = self.reference_gradients({**bound, **leaves}, tuple(leaves), create_graph=False)
        names = [name for name in self.differentiable if name != "residual"]
        found = tuple(grads[name] if name in grads else self._lead(bound).new_empty(0) for name in names)
        return found[0] if len(found) == 1 else found

    def reference_gradients(self, bound: Bound, wanted: tuple[str, ...], create_graph: bool) -> dict[str, Tensor]:
        """Gradients of the named inputs by automatic differentiation of the reference."""
        if bound["grad_out"].is_meta:  # the reference reads lengths; of shapes, any dependence on all inputs will do
            out = sum(bound[name].sum() for name in wanted).square().expand_as(bound["grad_out"])
        else:
            result = self.reference(*self._reference_arguments(bound))
            out = result if isinstance(result, Tensor) else result[0]
        grads = torch.autograd.grad(
            out,
            [bound[name] for name in wanted],
            bound["grad_out"].to(out.dtype),
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(wanted, grads, strict=True))

    def _reference_arguments(self, bound: Bound) -> list[Any]:
        """The reference's arguments in order, floating ones in the dtype of accumulation."""
        dtype = exact_dtype(self._lead(bound).dtype)
        arguments = []
        for name in self.reference_names:
            x = bound.get(name)
            if isinstance(x, Tensor) and x.is_floating_point() and name not in ("cos", "sin"):
                x = x.to(dtype)
            arguments.append(x)
        return arguments

    def _lead(self, bound: Bound) -> Tensor:
        lead = bound[self.differentiable[0]]
        assert isinstance(lead, Tensor)
        return lead

    def _launcher(self, bound: Bound) -> Any:
        lead = self._lead(bound)
        heads = [x.shape[-1] for name in ("k", "v") if (x := bound.get(name)) is not None]
        return _backend.launcher(self.name, bound["backend"], lead.device.type, lead.dtype, max(heads, default=0))

    # -------------------------------------------------------- the differentiable call

    def __call__(self, *args: Any, shows_lse: bool = False) -> Any:
        """Run the op; the graph is recorded where gradients are wanted."""
        if torch.compiler.is_compiling():
            # The op's own autograd kernel serves: strict export would keep an autograd.Function as its forward alone.
            return self.forward_op(*args)
        autograd.refuse_tangents(self.name, args)
        if wants_gradients(*args):
            outputs = autograd.Joined.apply(self.name, shows_lse, *args)  # type: ignore[no-untyped-call]
            return outputs if self.extras else outputs[0]
        return autograd.run(self.forward_op, *args)


@contextlib.contextmanager
def _recording_autograd() -> Iterator[None]:
    """Let autograd record inside an op's implementation, where the dispatcher may have switched it off."""
    key = torch._C.DispatchKey
    exclude = torch._C._SetExcludeDispatchKeyGuard
    with exclude(key.AutogradFunctionality, False), exclude(key.ADInplaceOrView, False), torch.enable_grad():
        yield


def _plain_autocast_off(bound: Bound) -> Any:
    """Autocast off for the reference, whose arguments already have the dtype it shall compute in."""
    device = next(x.device.type for x in bound.values() if isinstance(x, Tensor))
    return torch.autocast(device, enabled=False)


def any_number(size: int) -> int:
    """`size`, of which the compiler shall not ask whether it is 1.

    A size that is an argument's own is taken for 2 at least, and a graph for such sizes serves 0 and 1 as well. One
    that is computed from it, as a number of rows `offsets.shape[0] - 1`, may be 1 as far as the compiler sees, and its
    questions about strides become guards: a graph that refuses a single row. Here those of its questions that have an
    answer which is right for any size (`guard_or_false`) get that one. PyTorch has a switch for it, but for all sizes
    of the process (`backed_size_oblivious`).
    """
    if isinstance(size, torch.SymInt) and (env := size.node.shape_env) is not None:
        if not hasattr(env, "_interformer_any_number"):
            env._interformer_any_number = set()
            ask = env.evaluate_sym_node

            def evaluate(node: Any, size_oblivious: bool = False, fallback_value: bool | None = None) -> Any:
                if fallback_value is not None and node.expr.free_symbols & env._interformer_any_number:
                    known = env._maybe_evaluate_static(node.expr)
                    return fallback_value if known is None else bool(known)
                return ask(node, size_oblivious, fallback_value)

            env.evaluate_sym_node = evaluate
        env._interformer_any_number |= size.node.expr.free_symbols
    return size
