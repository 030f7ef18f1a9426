"""An op's declaration, and all that follows from it: schemas, fakes, differentiable inputs, axes, checks of arguments.

`OpSpec` reads the fields of a call (`_calls.py`), each with its annotation. `PublicOp` is a public function's view of
one: its name and layouts, and its own names for the fields. Registration is in `_registered.py`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels._calls import AtLeast, Broadcast, Offsets, OneOf, Values
from interformer_kernels.ops._compiling import any_number

Call = Any  # one of the named tuples of `_calls.py`

_PLAIN = (Tensor, torch.nn.Parameter)
_SCHEMA_TYPES = {Tensor: "Tensor", float: "float", int: "SymInt", bool: "bool", str: "str"}


class Field(NamedTuple):
    """One field of a call."""

    name: str
    type: type
    optional: bool
    note: Any

    @property
    def schema(self) -> str:
        """The field as an argument of a registered op."""
        return f"{_SCHEMA_TYPES[self.type]}{'?' if self.optional else ''} {self.name}"

    @property
    def differentiable(self) -> bool:
        """Whether the field gets a gradient."""
        return isinstance(self.note, (Values, Broadcast))


def _fields(call: type) -> tuple[Field, ...]:
    return tuple(_field(name, hint) for name, hint in typing.get_type_hints(call, include_extras=True).items())


def _field(name: str, hint: Any) -> Field:
    note = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, note = typing.get_args(hint)
    optional = isinstance(hint, types.UnionType)
    kind = next(part for part in typing.get_args(hint) if part is not types.NoneType) if optional else hint
    return Field(name, kind, optional, note)


class OpSpec:
    """The declaration of one registered op.

    `<name>_fwd` takes the fields of the call, then a `residual` (unless the op has none), `keep_attn_out` where the op
    saves A, the public function's name for messages, and the backend's name. It returns the output and `saved`.
    `<name>_bwd` takes `grad_out`, `saved`, the fields, and both names; it returns one gradient for each differentiable
    field. The residual's gradient is the output's own and needs no kernel.

    Args:
        name: of the registered pair, and of the backends' modules.
        call: the named tuple of its arguments.
        out: axes of the output, by layout where the layouts differ.
        reference: `reference(call, residual)`, or `reference(call)` without one, in eager PyTorch.
        validate: `validate(public, call)` checks the contents of index tensors.
        flops: floating-point operations of the forward of a call.
        backward_over_forward: those of the backward, in multiples of the forward's.
        saved: further outputs, which the backward reads.
        empty_saved: allocates them: `empty_saved(call, out, keep_attn_out)`.
        reads_attn_out: whether the backward of a call reads A: `reads_attn_out(public name, backend, call)`.
        residual: whether the op takes one.
    """

    def __init__(
        self,
        name: str,
        call: type,
        out: str | dict[str, str],
        *,
        reference: Callable[..., Any],
        validate: Callable[[PublicOp, Call], None],
        flops: Callable[[Call], int],
        backward_over_forward: float,
        saved: tuple[str, ...] = (),
        empty_saved: Callable[[Call, Tensor, bool], tuple[Tensor, ...]] = lambda call, out, keep: (),
        reads_attn_out: Callable[[str, str, Call], bool] = lambda name, backend, call: False,
        residual: bool = True,
    ) -> None:
        self.name, self.call, self.out, self.saved, self.has_residual = name, call, out, saved, residual
        self.reference, self.validate, self.reads_attn_out, self.empty_saved = (
            reference, validate, reads_attn_out, empty_saved,
        )  # fmt: skip
        self.flops, self.backward_over_forward = flops, backward_over_forward
        self.fields = _fields(call)
        self.names = tuple(field.name for field in self.fields)
        self.keeps_attn_out = "attn_out" in saved
        self.gradients = tuple(field.name for field in self.fields if field.differentiable)
        self.differentiable = (*self.gradients, *(["residual"] if residual else []))
        extra = (["Tensor? residual"] if residual else []) + (["bool keep_attn_out"] if self.keeps_attn_out else [])
        fields, names = [field.schema for field in self.fields], ["str op", "str backend"]
        self.forward_schema = f"({', '.join(fields + extra + names)}) -> {_tensors(1 + len(saved))}"
        given = [f"Tensor {name}" for name in ("grad_out", *saved)]
        self.backward_schema = f"({', '.join(given + fields + names)}) -> {_tensors(len(self.gradients))}"
        self.forward_names = _names_of(fields + extra + names)
        self.backward_names = _names_of(given + fields + names)
        self._gradient_places = tuple(map(self.names.index, self.gradients))
        self._input_places = tuple(map(self.forward_names.index, self.differentiable))

    def forward_call(self, args: tuple[Any, ...]) -> tuple[Call, dict[str, Any]]:
        """The call among the arguments of `<name>_fwd`, and the others by name."""
        count = len(self.names)
        return self.call(*args[:count]), dict(zip(self.forward_names[count:], args[count:], strict=True))

    def backward_call(self, args: tuple[Any, ...]) -> tuple[Call, dict[str, Any]]:
        """The call among the arguments of `<name>_bwd`, and the others by name."""
        start, stop = 1 + len(self.saved), 1 + len(self.saved) + len(self.names)
        others = zip((*self.backward_names[:start], "op", "backend"), (*args[:start], *args[stop:]), strict=True)
        return self.call(*args[start:stop]), dict(others)

    def without_inputs(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments of `<name>_fwd`, None in place of the differentiable ones."""
        rest = list(args)
        for place in self._input_places:
            rest[place] = None
        return tuple(rest)

    def filled(self, rest: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """The arguments of `<name>_fwd` again."""
        args = list(rest)
        for place, x in zip(self._input_places, inputs, strict=True):
            args[place] = x
        return args

    def forward_fake(self, *args: Any) -> Any:
        """Uninitialised outputs of `<name>_fwd`."""
        call, others = self.forward_call(args)
        rows, *shape = call.out_shape()
        if getattr(call, "layout", "") == "shared":
            rows = any_number(rows)
        out = self.lead(call).new_empty((rows, *shape))
        saved = self.empty_saved(call, out, others.get("keep_attn_out", False))
        return (out, *saved) if saved else out

    def backward_fake(self, *args: Any) -> Any:
        """Uninitialised contiguous gradients; an empty one for an input that was not given."""
        call, _ = self.backward_call(args)
        inputs = [getattr(call, name) for name in self.gradients]
        grads = tuple(self.lead(call).new_empty((0,) if x is None else x.shape) for x in inputs)
        return grads if len(grads) > 1 else grads[0]

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
        channels = int(call.k.shape[2])
        return channels if call.v is None else max(channels, int(call.v.shape[2]))

    def axes(self, name: str, layout: str) -> str:
        """Axes of a floating field of a call of this layout."""
        note = next(field.note for field in self.fields if field.name == name)
        return _of_layout(note.axes, layout)

    def out_axes(self, layout: str) -> str:
        """Axes of the output of a call of this layout."""
        return _of_layout(self.out, layout)


def _of_layout(axes: str | dict[str, str], layout: str) -> str:
    return axes if isinstance(axes, str) else axes[layout]


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _names_of(arguments: list[str]) -> tuple[str, ...]:
    return tuple(argument.split()[1] for argument in arguments)


ALL: dict[str, PublicOp] = {}  # every public function of a registered op, by its name


class PublicOp:
    """A public function of a registered op.

    Args:
        name: the function's.
        spec: the declaration behind it.
        layouts: those that its calls may have.
        lead: the field whose dtype and device the other floating tensors must share.
        required: fields that its calls must have, though they are optional in others.
        names: its own names of fields and axes, where they differ.
    """

    def __init__(
        self,
        name: str,
        spec: OpSpec,
        layouts: tuple[str, ...] = ("",),
        *,
        lead: str = "",
        required: tuple[str, ...] = (),
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.spec, self.layouts = name, spec, layouts
        self.lead, self.required, self.names = lead or spec.gradients[0], required, names or {}
        values = [field.name for field in spec.fields if isinstance(field.note, Values)]
        self.values = sorted(values, key=lambda name: name != self.lead)
        self._axes = {
            layout: tuple(
                (spec.names.index(name), self.named(name), tuple(map(self.named, spec.axes(name, layout).split())))
                for name in self.values
            )
            for layout in layouts
        }
        self.offsets = [field for field in spec.fields if isinstance(field.note, Offsets)]
        self._lead_name, self._float_names = self.named(self.lead), (*map(self.named, spec.gradients), "residual")
        self._lead_place = spec.names.index(self.lead)
        self._rows_place = next(spec.names.index(field.name) for field in self.offsets if not field.optional)
        self.options: list[Field] = []
        ALL[name] = self

    def named(self, name: str) -> str:
        """The function's own name of a field or of an axis."""
        return self.names.get(name, name)

    def offsets_name(self, call: Any, name: str) -> str:
        """The function's own name of offsets: in self attention one argument serves queries and keys."""
        return self.named("q_offsets" if name == "kv_offsets" and call.self_attention else name)

    def take_signature(self, parameters: Sequence[str]) -> None:
        """Take the function's parameters: offsets are checked in their order, and options that are among them."""
        places = {name: place for place, name in enumerate(parameters)}
        self.offsets.sort(key=lambda field: places.get(self.named(field.name), len(places)))
        checked = [
            field for field in self.spec.fields if isinstance(field.note, (OneOf, AtLeast)) or field.type is bool
        ]
        self.options = [field for field in checked if self.named(field.name) in parameters]

    def checked(self, call: Any, residual: Tensor | None = None) -> tuple[Any, Tensor | None]:
        """The call and the residual after autocast, their kinds, dtypes, devices, axes and options checked."""
        tensors = [*self.spec.inputs(call), residual]
        cast = checks.autocast_dtype(call[self._lead_place])
        if cast is not None:
            *values, residual = tensors = [checks.autocast(x, cast) for x in tensors]
            call = call._replace(**dict(zip(self.spec.gradients, values, strict=True)))
        sizes = self._sizes(call, tensors)
        if sizes is None:
            checks.check_floats(self.name, self._lead_name, dict(zip(self._float_names, tensors, strict=True)))
        self._check_offsets(call)
        if sizes is None:
            sizes = self._checked_axes(call)
        if "Hk" in sizes:
            sizes.setdefault("Dv", sizes["D"])  # v is k
            checks.check_heads(self.name, sizes)
        shape = call.out_shape()
        gate = getattr(call, "gate", None)
        if gate is not None:
            checks.check_broadcasts(self.name, "gate", gate, shape)
        return self._with_options(call), checks.check_residual(self.name, residual, shape)

    def _check_offsets(self, call: Any) -> None:
        device, rows, first = getattr(call, self.lead).device, None, ""
        for field in self.offsets:
            offsets, name = getattr(call, field.name), self.offsets_name(call, field.name)
            if offsets is None and field.optional:
                continue
            found = checks.check_offsets(self.name, name, offsets, device)
            if rows is not None and found != rows:
                wanted = f"[B+1] with B = {rows} (from {first})"
                raise ValueError(f"{self.name}: {name} must be {wanted}, found B = {found}")
            rows, first = found, name

    def _sizes(self, call: Any, tensors: Sequence[Any]) -> dict[str, int] | None:
        """Sizes of the axes of a call whose floating tensors are plain and right; None for any other.

        Most calls pass here, in a third of the time of the checks that can say what is wrong.
        """
        lead, offsets = call[self._lead_place], call[self._rows_place]
        if not _is_plain(lead) or lead.dtype not in checks.FLOAT_DTYPES or not _is_plain(offsets):
            return None
        dtype, device = lead.dtype, lead.device
        for x in tensors:
            if x is not None and not (_is_plain(x) and x.dtype is dtype and x.device == device):
                return None
        sizes = {"B": offsets.shape[0] - 1} if offsets.dim() == 1 else {}
        for place, name, axes in self._axes[getattr(call, "layout", "")]:
            x = call[place]
            if x is None:
                if name in self.required:
                    return None
                continue
            shape = x.shape
            if len(shape) != len(axes):
                return None
            for axis, size in zip(axes, shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    return None
            if name == "q" and call.self_attention:
                sizes["Tk"] = sizes["Tq"]
        return sizes

    def _checked_axes(self, call: Any) -> dict[str, int]:
        axes = checks.Axes(self.name, B=call[self._rows_place].shape[0] - 1)
        for place, name, wanted in self._axes[getattr(call, "layout", "")]:
            value = call[place]
            if value is not None or name in self.required:
                axes.bind(name, value, wanted)
            if name == "q" and call.self_attention:
                axes.sizes["Tk"] = axes["Tq"]
        return axes.sizes

    def _with_options(self, call: Any) -> Any:
        changed = {}
        for field in self.options:
            value, name, note = getattr(call, field.name), self.named(field.name), field.note
            if isinstance(note, OneOf):
                checks.check_choice(self.name, name, value, note.choices)
                continue
            if field.type is bool:
                checked = checks.check_bool(self.name, name, value)
            else:
                checked = checks.check_count(self.name, name, value, note.bound)
            if checked is not value:
                changed[field.name] = checked
        return call._replace(**changed) if changed else call

    def shard_layouts(self) -> dict[str, str]:
        """Axes of the floating arguments, the leading one first, as the rules for DTensors read them."""
        axes = {name: [self.spec.axes(name, layout) for layout in self.layouts] for name in self.values}
        return {self.named(name): _alternatives(forms) for name, forms in axes.items()}

    def shard_out(self) -> str:
        """Axes of the output, as the rules for DTensors read them."""
        return _alternatives([self.spec.out_axes(layout) for layout in self.layouts])


def _is_plain(x: Any) -> bool:
    return type(x) in _PLAIN and x.layout is torch.strided and not x.is_nested


def _alternatives(forms: list[str]) -> str:
    return " | ".join(dict.fromkeys(forms))


def public_op(spec: OpSpec, name: str) -> PublicOp:
    """The public function of this name, as the arguments of a registered op hold it."""
    public = ALL.get(name)
    if public is None or public.spec is not spec:
        names = ", ".join(public.name for public in ALL.values() if public.spec is spec)
        raise ValueError(f"{spec.name}: op must be one of {names}; found {checks.describe(name)}")
    return public
