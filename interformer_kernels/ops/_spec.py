"""An op's declaration, and what follows from it: schemas, fakes, differentiable inputs, axes.

`OpSpec` reads the fields of a call (`_calls.py`), each with its annotation. Registration is in `_registered.py`; the
public functions of an op, which may be several, are `_public.py`'s.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Parameter

from interformer_kernels._calls import Values, Wide, fields_of
from interformer_kernels._launch.tensors import accumulation_dtype
from interformer_kernels.ops._compiling import any_number

if TYPE_CHECKING:
    from interformer_kernels.ops._public import PublicOp

Call = Any  # one of the named tuples of `_calls.py`

PLAIN_TENSORS = (Tensor, Parameter)  # not a subclass that means something else by its operations


class OpSpec:
    """The declaration of one registered op.

    `<name>_fwd` takes the fields of the call, then a `residual` (unless the op has none), `keep_attn_out` where the op
    saves A, the public function's name for messages, and the backend's name. It returns the output and `saved`.
    `<name>_bwd` takes `grad_out`, `grad_lse` where the op saves the log-sum-exp (None: nobody asks for its gradient),
    `saved`, the fields, and both names; it returns one gradient for each differentiable field. The residual's gradient
    is the output's own and needs no kernel.

    Args:
        name: of the registered pair, and of the backends' modules.
        call: the named tuple of its arguments.
        out: axes of the output, by layout where the layouts differ.
        reference: `reference(call, residual)`, or `reference(call)` without one, in eager PyTorch.
        validate: `validate(public, call)` checks the contents of index tensors.
        check_options: `check_options(public, call)` checks options against one another.
        flops: floating-point operations of the forward of a call.
        backward_over_forward: those of the backward, in multiples of the forward's.
        saved: further outputs, which the backward reads; of these `lse`, the first, may be differentiated.
        empty_saved: allocates them: `empty_saved(call, out, keep_attn_out)`.
        reads_attn_out: whether the backward of a call reads A: `reads_attn_out(public name, backend, call)`.
        residual: whether the op takes one.
    """

    def __init__(
        self,
        name: str,
        call: Any,
        out: str | dict[str, str],
        *,
        reference: Callable[..., Any],
        validate: Callable[[PublicOp, Call], None],
        flops: Callable[[Call], int],
        backward_over_forward: float,
        check_options: Callable[[PublicOp, Call], None] = lambda public, call: None,
        saved: tuple[str, ...] = (),
        empty_saved: Callable[[Call, Tensor, bool], tuple[Tensor, ...]] = lambda call, out, keep: (),
        reads_attn_out: Callable[[str, str, Call], bool] = lambda name, backend, call: False,
        residual: bool = True,
    ) -> None:
        self.name, self.call, self.out, self.saved, self.has_residual = name, call, out, saved, residual
        self.reference, self.validate, self.check_options = reference, validate, check_options
        self.flops, self.backward_over_forward = flops, backward_over_forward
        self.empty_saved, self.reads_attn_out = empty_saved, reads_attn_out
        self.fields = fields_of(call)
        self.names = tuple(field.name for field in self.fields)
        self.keeps_attn_out, self.has_lse = "attn_out" in saved, "lse" in saved
        self.gradients = tuple(field.name for field in self.fields if field.differentiable)
        self.wide = frozenset(field.name for field in self.fields if isinstance(field.note, Wide))
        self.differentiable = (*self.gradients, *(["residual"] if residual else []))
        extra = (["Tensor? residual"] if residual else []) + (["bool keep_attn_out"] if self.keeps_attn_out else [])
        fields, names = [field.schema for field in self.fields], ["str op", "str backend"]
        self.forward_schema = f"({', '.join(fields + extra + names)}) -> {_tensors(1 + len(saved))}"
        given = ["Tensor grad_out", *(["Tensor? grad_lse"] if self.has_lse else []), *(f"Tensor {x}" for x in saved)]
        self.backward_schema = f"({', '.join(given + fields + names)}) -> {_tensors(len(self.gradients))}"
        self.forward_names = _names_of(fields + extra + names)
        self.backward_names = _names_of(given + fields + names)
        self._gradient_places = tuple(map(self.names.index, self.gradients))
        inputs = [self.forward_names.index(name) for name in self.differentiable]
        others = [place for place in range(len(self.forward_names)) if place not in inputs]
        self.without_inputs, self.filled = taken(others), _put_back(others, inputs)
        tensors = [place for place, field in enumerate(self.fields) if field.type is Tensor]
        self.forward_tensors = taken(sorted({*tensors, *inputs}))
        # Saved outputs and fields, as the backward takes them behind the gradients of outputs.
        self.outputs = 1 + self.has_lse
        saves = [*range(len(saved)), *(len(saved) + place for place in tensors)]
        options = [place for place in range(len(saved) + len(self.names)) if place not in saves]
        self.saved_tensors, self.saved_options = taken(saves), taken(options)
        self.restored = _put_back(saves, options)
        self.backward_tensors = taken([*range(self.outputs), *(self.outputs + place for place in saves)])

    # The first two take the arguments of `<name>_fwd`, the next two saved outputs and fields; all give tuples.
    without_inputs: Callable[[Sequence[Any]], tuple[Any, ...]]  # those that are not differentiable
    forward_tensors: Callable[[Sequence[Any]], tuple[Any, ...]]
    saved_tensors: Callable[[Sequence[Any]], tuple[Any, ...]]
    saved_options: Callable[[Sequence[Any]], tuple[Any, ...]]  # those that are no tensors
    backward_tensors: Callable[[Sequence[Any]], tuple[Any, ...]]  # among the arguments of `<name>_bwd`
    filled: Callable[[Iterable[Any], Iterable[Any]], tuple[Any, ...]]  # `without_inputs`, and the inputs, put together
    restored: Callable[[Iterable[Any], Iterable[Any]], tuple[Any, ...]]  # the same for saved tensors and options

    def forward_call(self, args: tuple[Any, ...]) -> tuple[Call, dict[str, Any]]:
        """The call among the arguments of `<name>_fwd`, and the others by name."""
        count = len(self.names)
        return self.call._make(args[:count]), dict(zip(self.forward_names[count:], args[count:], strict=True))

    def backward_call(self, args: tuple[Any, ...]) -> tuple[Call, dict[str, Any]]:
        """The call among the arguments of `<name>_bwd`, and the others by name."""
        start = self.outputs + len(self.saved)
        stop = start + len(self.names)
        others = zip((*self.backward_names[:start], "op", "backend"), (*args[:start], *args[stop:]), strict=True)
        return self.call._make(args[start:stop]), dict(others)

    def forward_fake(self, *args: Any) -> Any:
        """Uninitialised outputs of `<name>_fwd`."""
        call, others = self.forward_call(args)
        rows, *shape = call.out_shape()
        if self._counts_rows(getattr(call, "layout", "")):
            rows = any_number(rows)
        out = self.lead(call).new_empty((rows, *shape))
        saved = self.empty_saved(call, out, others.get("keep_attn_out", False))
        return (out, *saved) if saved else out

    def _counts_rows(self, layout: str) -> bool:
        """Whether the output's first axis is a number of rows that follows from the offsets alone."""
        values = [field.name for field in self.fields if isinstance(field.note, Values)]
        first = [axes.split()[0] for axes in (self.out_axes(layout), *(self.axes(name, layout) for name in values))]
        return first[0] == "B" and "B" not in first[1:]

    def backward_fake(self, *args: Any) -> Any:
        """Uninitialised contiguous gradients; an empty one for an input that was not given."""
        call, _ = self.backward_call(args)
        grads = tuple(self.empty_gradient(call, name) for name in self.gradients)
        return grads if len(grads) > 1 else grads[0]

    def empty_gradient(self, call: Call, name: str) -> Tensor:
        """An uninitialised gradient of a differentiable field, without numbers where the field was not given."""
        x, lead = getattr(call, name), self.lead(call)
        dtype = accumulation_dtype(lead.dtype) if name in self.wide else lead.dtype
        return lead.new_empty((0,) if x is None else x.shape, dtype=dtype)

    def shows_lse(self, call: Call) -> bool:
        """Whether a call has a log-sum-exp, which only a softmax has."""
        return self.has_lse and call.score == "softmax"

    def lead(self, call: Call) -> Tensor:
        """The first floating tensor, whose dtype and device all share."""
        lead: Tensor = call[self._gradient_places[0]]
        return lead

    def inputs(self, call: Call) -> list[Any]:
        """The differentiable fields of a call."""
        return [call[place] for place in self._gradient_places]

    def channels(self, call: Call) -> int:
        """Channels of the widest head of an op that attends; 0 for others."""
        if "k" not in self.names:
            return 0
        channels: int = call.k.shape[2]  # maybe symbolic
        return channels if call.v is None else max(channels, call.v.shape[2])

    def axes(self, name: str, layout: str) -> str:
        """Axes of a floating field of a call of this layout."""
        note = next(field.note for field in self.fields if field.name == name)
        return _of_layout(note.axes, layout)

    def out_axes(self, layout: str) -> str:
        """Axes of the output of a call of this layout."""
        return _of_layout(self.out, layout)


def taken(places: list[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes what is at these places, in C: a call of an op goes through several."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


def _put_back(first: list[int], second: list[int]) -> Callable[[Iterable[Any], Iterable[Any]], tuple[Any, ...]]:
    """A function that puts together again what two of `taken` took apart."""
    places = [*first, *second]
    take = taken([places.index(place) for place in range(len(places))])
    return lambda taken, others: take((*taken, *others))


def _of_layout(axes: str | dict[str, str], layout: str) -> str:
    return axes if isinstance(axes, str) else axes[layout]


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _names_of(arguments: list[str]) -> tuple[str, ...]:
    return tuple(argument.split()[1] for argument in arguments)


def with_heads(x: Any, axes: int) -> tuple[Any, bool]:
    """A tensor of so many axes with one head behind its tokens, and True; anything else as it is, and False."""
    is_flat = isinstance(x, Tensor) and x.dim() == axes
    return (x.unsqueeze(1) if is_flat else x), is_flat
