"""A public function of a registered op: what its calls may be, and the checks that follow from the op's declaration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import _checks as checks
from interformer_kernels._calls import (
    AtLeast,
    Field,
    Finite,
    Ints,
    Offsets,
    OneOf,
    Scale,
    Values,
    Wide,
    Within,
)
from interformer_kernels._launch.tensors import accumulation_dtype
from interformer_kernels.ops._spec import PLAIN_TENSORS, OpSpec, taken

_STRIDED = torch.strided
_PLAIN_KINDS = frozenset((str, int, float, bool, type(None)))  # compared by value, and never changed
_MOST_OPTIONS = 1024  # sets of options that are remembered
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
        self.lead, self.names = lead or spec.gradients[0], names or {}
        always = [field.name for field in spec.fields if isinstance(field.note, Values) and not field.optional]
        self.required = (*required, *always)
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
        self._shared = tuple(name for name in spec.gradients if name not in spec.wide)  # of the lead's dtype
        self._shared_places = [spec.names.index(name) for name in self._shared]
        self._lead_name, self._float_names = self.named(self.lead), (*map(self.named, self._shared), "residual")
        further = [field for field in spec.fields if isinstance(field.note, (Wide, Ints))]
        self._further = [(spec.names.index(field.name), field) for field in further]
        self._lead_place = spec.names.index(self.lead)
        self._rows_place = next(spec.names.index(field.name) for field in self.offsets if not field.optional)
        self._offsets_places = [(spec.names.index(field.name), field.optional) for field in self.offsets]
        self._scale_axis = next((field.note.axis for field in spec.fields if isinstance(field.note, Scale)), "")
        self._known_options: dict[tuple[Any, ...], dict[int, Any]] = {}
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
            field
            for field in self.spec.fields
            if isinstance(field.note, (OneOf, AtLeast, Finite, Within, Scale)) or field.type is bool
        ]
        self.options = [field for field in checked if self.named(field.name) in parameters]
        self._options_of = taken([self.spec.names.index(field.name) for field in self.options])

    def checked(self, call: Any, residual: Tensor | None = None) -> tuple[Any, Tensor | None]:
        """The call and the residual after autocast, their kinds, dtypes, devices, axes and options checked."""
        tensors = [*[call[place] for place in self._shared_places], residual]
        cast = checks.autocast_dtype(call[self._lead_place])
        if cast is not None:
            *values, residual = tensors = [checks.autocast(x, cast) for x in tensors]
            call = call._replace(**dict(zip(self._shared, values, strict=True)))
        sizes = self._sizes(call, tensors)
        if sizes is None:
            checks.check_floats(self.name, self._lead_name, dict(zip(self._float_names, tensors, strict=True)))
            self._check_offsets(call)
            sizes = self._checked_axes(call)
        if "Hk" in sizes:
            sizes.setdefault("Dv", sizes["D"])  # v is k
            checks.check_heads(self.name, sizes)
        gate = getattr(call, "gate", None)
        if gate is not None:
            checks.check_broadcasts(self.name, "gate", gate, call.out_shape())
        for place, field in self._further:
            if call[place] is not None:
                self._check_further(field, call[place], call, sizes)
        call = self._with_options(call, sizes)
        self.spec.check_options(self, call)
        return call, None if residual is None else checks.check_residual(self.name, residual, call.out_shape())

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

    def _check_further(self, field: Field, x: object, call: Any, sizes: Mapping[str, int]) -> None:
        """Check a tensor of another dtype than the lead's."""
        name, lead = self.named(field.name), getattr(call, self.lead)
        dtypes = field.note.dtypes if isinstance(field.note, Ints) else (accumulation_dtype(lead.dtype),)
        if not isinstance(x, Tensor) or x.dtype not in dtypes or not checks.is_dense(x):
            wanted = " or ".join(map(str, dtypes))
            raise TypeError(f"{self.name}: {name} must be a tensor of {wanted}, found {checks.describe(x)}")
        if x.device != lead.device:
            raise ValueError(
                f"{self.name}: {name} must be on {self._lead_name}'s device {lead.device}, found {x.device}"
            )
        axes = self.spec.axes(field.name, getattr(call, "layout", "")).split()
        checks.Axes(self.name, **sizes).bind(name, x, axes)

    def _sizes(self, call: Any, tensors: Sequence[Any]) -> dict[str, int] | None:
        """Sizes of the axes of a call whose offsets and floating tensors are plain and right; None for any other.

        Most calls pass here, in a third of the time of the checks that can say what is wrong.
        """
        lead = call[self._lead_place]
        if not _is_plain(lead) or lead.dtype not in checks.FLOAT_DTYPES:
            return None
        dtype, device, rows = lead.dtype, lead.device, -1
        for x in tensors:
            # Written out: a call of `_is_plain` for each takes longer than its questions.
            if x is not None and not (
                type(x) in PLAIN_TENSORS
                and x.dtype is dtype
                and x.device == device
                and x.layout is _STRIDED
                and not x.is_nested
            ):
                return None
        for place, optional in self._offsets_places:
            x = call[place]
            if x is None and optional:
                continue
            if not (_is_plain(x) and x.dtype in checks.INDEX_DTYPES and x.dim() == 1 and x.device == device):
                return None
            found = x.shape[0] - 1
            if found < 0 or (rows >= 0 and found != rows):
                return None
            rows = found
        sizes = {"B": rows}
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

    def _with_options(self, call: Any, sizes: Mapping[str, int]) -> Any:
        """The call with its options checked, as plain numbers; those of plain kinds are checked once for all calls."""
        if torch.compiler.is_compiling():
            changed = self._changed_options(call, sizes)
        else:
            changed = self._remembered_options(call, sizes)
        if not changed:
            return call
        values = [*call]  # `_replace` would take twice as long
        for place, value in changed.items():
            values[place] = value
        return call._make(values)

    def _remembered_options(self, call: Any, sizes: Mapping[str, int]) -> dict[int, Any]:
        values = self._options_of(call)
        kinds = tuple(map(type, values))
        if not _PLAIN_KINDS.issuperset(kinds):
            return self._changed_options(call, sizes)
        key = kinds, values, sizes.get(self._scale_axis)
        changed = self._known_options.get(key)
        if changed is None:
            changed = self._changed_options(call, sizes)
            if len(self._known_options) < _MOST_OPTIONS:
                self._known_options[key] = changed
        return changed

    def _changed_options(self, call: Any, sizes: Mapping[str, int]) -> dict[int, Any]:
        """The options that have another value once they are checked, by their places in the call."""
        changed: dict[int, Any] = {}
        for field in self.options:
            value, name, note = getattr(call, field.name), self.named(field.name), field.note
            if isinstance(note, OneOf):
                checks.check_choice(self.name, name, value, note.choices)
                continue
            if field.type is bool:
                checked: Any = checks.check_bool(self.name, name, value)
            elif isinstance(note, Scale) and value is None:
                checked = sizes[note.axis] ** -0.5
            elif isinstance(note, (Finite, Scale)):
                checked = checks.check_number(self.name, name, value)
            elif isinstance(note, Within):
                checked = checks.check_within(self.name, name, value, note.least, note.most)
            else:
                checked = checks.check_count(self.name, name, value, note.bound)
            if checked is not value:
                changed[self.spec.names.index(field.name)] = checked
        return changed

    def shard_layouts(self) -> dict[str, str]:
        """Axes of the floating arguments, the leading one first, as the rules for DTensors read them."""
        names = (*self.values, *sorted(self.spec.wide))
        axes = {name: [self.spec.axes(name, layout) for layout in self.layouts] for name in names}
        return {self.named(name): _alternatives(forms) for name, forms in axes.items()}

    def shard_out(self) -> str:
        """Axes of the output, as the rules for DTensors read them."""
        return _alternatives([self.spec.out_axes(layout) for layout in self.layouts])


def _is_plain(x: Any) -> bool:
    return type(x) in PLAIN_TENSORS and x.layout is _STRIDED and not x.is_nested


def _alternatives(forms: list[str]) -> str:
    return " | ".join(dict.fromkeys(forms))


def public_op(spec: OpSpec, name: str) -> PublicOp:
    """The public function of this name, as the arguments of a registered op hold it."""
    public = ALL.get(name)
    if public is None or public.spec is not spec:
        names = ", ".join(public.name for public in ALL.values() if public.spec is spec)
        raise ValueError(f"{spec.name}: op must be one of {names}; found {checks.describe(name)}")
    return public
