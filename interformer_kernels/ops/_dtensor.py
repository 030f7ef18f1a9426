"""An op called with DTensors: every process computes its own part, and nothing is sent.

Each dimension of the mesh shares out one kind of axis, or nothing:

| shared out | sharded | whole (`Replicate`), its gradient a sum over the processes (`Partial`) |
|---|---|---|
| rows: the offsets are `Shard(0)` | what has rows or tokens, on axis 0 | seeds, tables, gates, residuals without rows |
| heads | what has heads, on that axis; `k` and `v` or not | gates, residuals that broadcast so; `k`, `v` where not |
| features `F` of `personalized_ffn` | weight, bias, residual, output | `x` |
| channels `E` of `personalized_ffn` (linear: no activation, bias, residual) | `x`, weight; output `Partial` | nothing |
| nothing | nothing | everything, the gradients, too |

Tables are sinks and biases; those of all heads are sharded with the heads. Dropout is refused wherever something is
shared out: it follows a weight's head and its query's place in the batch, which a part does not know.

**Heads.** Offsets, rotary tables and positions are plain tensors or whole ones, the same in all processes. Heads must
divide evenly. Whole `k` and `v` serve where there are fewer key/value heads than processes: each reads its own of them.

**Rows.** Offsets that are `Shard(0)` say that every process holds rows of its own, with its own offsets, which begin at
0: `[B_r + 1]` for its `B_r` rows, so that the DTensor's global size is `B` plus the number of processes. With
`kv_rows`, each process' own, too, its query rows read key rows of its own. Token counts
may differ from process to process; then `DTensor.from_local` needs the global `shape` and `stride`, and what moves such
tensors later (`full_tensor`, `redistribute`) is not for them, since PyTorch takes shards to be those of `torch.chunk`.

Any other placement is refused: the caller decides what is gathered. Only public parts of DTensor are used (`to_local`,
`from_local`), and autograd and `torch.compile` see through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

# The kinds of axes that a mesh dimension can shard, and the axes that each of them cuts.
_CUT = {
    "rows": ("B", "T", "Tq", "Tk"),
    "heads": ("H", "Hk"),
    "features": ("F",),
    "channels": ("E",),
}
_KEYS = ("k", "v")  # may stay whole where heads are sharded
_BROADCAST = ("gate", "residual")  # broadcast to the output
_OFFSETS = ("offsets", "kv_offsets", "q_offsets")
_SHARED_BY_ROWS = "rope", "time_edges"
_OF_ROWS = (*_OFFSETS, "kv_rows", "rope_positions", "positions", "num_targets", "times")
_TABLES = (*_OF_ROWS, *_SHARED_BY_ROWS)  # carry no gradient


def call_on_parts(
    op: Callable[..., Any], arguments: dict[str, Any], layouts: dict[str, str], out: str
) -> DTensor | tuple[DTensor, ...]:
    """`op(**arguments)` of this process' parts, the results DTensors again; see the module's docstring.

    Raises:
        TypeError: a floating argument is a plain tensor.
        ValueError: the arguments lie on different meshes, or a placement would need something to be sent.
    """
    call = _Call(op.__name__, arguments, layouts, out)
    outputs = op(**{name: call.local_part(name, x) for name, x in arguments.items()})
    return tuple(map(call.as_global, outputs)) if isinstance(outputs, tuple) else call.as_global(outputs)


class _Call:
    """One call: the kind of axes that each mesh dimension shards, and the placements that follow."""

    def __init__(self, op: str, arguments: dict[str, Any], layouts: dict[str, str], out: str) -> None:
        self.op, self.arguments = op, arguments
        self.lead = next(iter(layouts))
        lead = arguments.get(self.lead)
        if not isinstance(lead, DTensor):
            raise TypeError(f"{op}: {self.lead} must be a DTensor where another argument is one, found {_kind(lead)}")
        self.mesh: DeviceMesh = lead.device_mesh
        forms = {name: layout for name, layout in layouts.items() if _given(arguments, name)}
        self.out = _form(out, lead.dim() if "|" in out else None)
        self.layouts: dict[str, tuple[str, ...]] = {}
        for name, x in arguments.items():
            self._check_kind(name, x, name in forms or (name in _BROADCAST and x is not None))
            if name in forms:
                self.layouts[name] = self._axes(name, x, forms[name])
        for name in _BROADCAST:
            if _given(arguments, name):
                self.layouts[name] = _broadcast_axes(arguments[name], self.out)
        self.shared = tuple(self._shared_out(dim) for dim in range(self.mesh.ndim))
        if "channels" in self.shared:
            self._check_linear()
        if arguments.get("dropout_p") and any(self.shared):
            wanted = "0 where rows or heads are shared out: the processes would drop alike"
            raise ValueError(f"{op}: dropout_p must be {wanted}; found {arguments['dropout_p']}")

    # ------------------------------------------------------------ what is shared out

    def _axes(self, name: str, x: Tensor, layout: str) -> tuple[str, ...]:
        axes = tuple(_one_or_all_heads(axis, x) for axis in _form(layout, x.dim()))
        if len(axes) != x.dim():
            raise ValueError(f"{self.op}: {name} must be [{', '.join(axes)}], found shape {list(x.shape)}")
        return axes

    def _check_kind(self, name: str, x: Any, floating: bool) -> None:
        if floating and not isinstance(x, DTensor):
            raise TypeError(f"{self.op}: {name} must be a DTensor, as {self.lead} is, found {_kind(x)}")
        if isinstance(x, DTensor) and x.device_mesh != self.mesh:
            raise ValueError(f"{self.op}: {name} must lie on {self.lead}'s mesh {self.mesh}, found {x.device_mesh}")

    def _shared_out(self, dim: int) -> str | None:
        """The kind of axes that a mesh dimension shards, by the first sharded argument; offsets come first."""
        offsets = [x for name in _OFFSETS if isinstance(x := self.arguments.get(name), DTensor)]
        if any(x.placements[dim] == Shard(0) for x in offsets):
            return "rows"
        for name, axes in self.layouts.items():
            placement = self.arguments[name].placements[dim]
            if placement == Replicate():
                continue
            for what, cut in _CUT.items():
                if what != "rows" and any(placement == Shard(axes.index(axis)) for axis in cut if axis in axes):
                    return what
            if placement == Shard(0) and axes[0] in _CUT["rows"]:
                raise ValueError(
                    f"{self.op}: offsets must be a DTensor with Shard(0) on mesh dimension {dim}, each process' own "
                    f"beginning at 0, where rows are shared out; found {name} with {placement} there"
                )
            self._refuse(name, self.arguments[name], dim, "Replicate(), or Shard of rows, heads or features")
        return None

    def _refuse(self, name: str, x: DTensor, dim: int, wanted: str) -> NoReturn:
        raise ValueError(f"{self.op}: {name} must be {wanted} on mesh dimension {dim}, found {x.placements[dim]}")

    def _check_linear(self) -> None:
        """Refuse whatever is not linear in the partial sums over channels."""
        if self.arguments.get("activation", "identity") != "identity":
            wanted = 'activation must be "identity" where channels are sharded'
            raise ValueError(f"{self.op}: {wanted}, found {self.arguments['activation']!r}")
        for name in ("bias", "residual"):
            if _given(self.arguments, name):
                wanted = "None where channels are sharded (add it to the reduced output)"
                raise ValueError(f"{self.op}: {name} must be {wanted}, found {_kind(self.arguments[name])}")

    # ------------------------------------------------------------ local parts

    def local_part(self, name: str, x: Any) -> Any:
        """The local part of an argument."""
        if name in self.layouts:
            return self._local_floats(name, x)
        if name in _TABLES:
            parts = x if isinstance(x, (tuple, list)) else (x,)
            local = tuple(self._local_index(name, part) for part in parts)
            return local if isinstance(x, (tuple, list)) else local[0]
        return x

    def _local_index(self, name: str, x: Any) -> Any:
        """Local offsets or positions where rows are sharded; otherwise, and for tables, the same in all processes."""
        by_rows = name not in _SHARED_BY_ROWS
        if isinstance(x, DTensor):
            for dim, what in enumerate(self.shared):
                wanted = Shard(0) if by_rows and what == "rows" else Replicate()
                if x.placements[dim] != wanted:
                    self._refuse(name, x, dim, str(wanted))
            return x.to_local()
        if isinstance(x, Tensor) and by_rows and "rows" in self.shared:
            because = "as the offsets, where rows are shared out"
            raise TypeError(f"{self.op}: {name} must be a DTensor with Shard(0), {because}; found {_kind(x)}")
        return x

    def _local_floats(self, name: str, x: DTensor) -> Tensor:
        placements, gradients = self._placements(self.layouts[name]), []
        whole = name in _KEYS and all(
            x.placements[dim] == Replicate() for dim, what in enumerate(self.shared) if what == "heads"
        )
        for dim, what in enumerate(self.shared):
            wanted = Replicate() if what == "heads" and whole else placements[dim]
            if x.placements[dim] != wanted:
                because = f" where {what} are shared out" if what else ""
                self._refuse(name, x, dim, f"{wanted}{because}")
            gradients.append(Partial() if what and wanted == Replicate() else wanted)
        self._check_even(name, x, tuple(self.layouts[name]))
        local = x.to_local(grad_placements=gradients)
        return self._local_heads(name, local) if whole and "heads" in self.shared else local

    def _placements(self, axes: tuple[str, ...]) -> list[Placement]:
        """Placements of a tensor with these axes."""
        placements: list[Placement] = []
        for what in self.shared:
            cut = [i for i, axis in enumerate(axes) if what and axis in _CUT[what]]
            placements.append(Shard(cut[0]) if cut else Replicate())
        return placements

    def _check_even(self, name: str, x: DTensor, axes: tuple[str, ...]) -> None:
        for i, axis in enumerate(axes):
            what = next((what for what in self.shared if what not in (None, "rows") and axis in _CUT[what]), None)
            if what and Shard(i) in x.placements and x.shape[i] % (parts := self._part(what).parts):
                wanted = f"a multiple of the {parts} parts that {what} are shared out in"
                raise ValueError(f"{self.op}: axis {axis} of {name} must be {wanted}, found {x.shape[i]}")

    def _part(self, what: str) -> _Part:
        """This process' part of `what`, of how many; mesh dimensions divide it one after another."""
        index, count = 0, 1
        for dim, shared in enumerate(self.shared):
            if shared == what:
                size = self.mesh.size(dim)
                index, count = index * size + self.mesh.get_local_rank(dim), count * size
        return _Part(index, count)

    def _local_heads(self, name: str, x: Tensor) -> Tensor:
        """The heads of whole keys or values that this process' queries read."""
        of_queries = next(n for n, axes in self.layouts.items() if "H" in axes)
        heads, key_heads = self.arguments[of_queries].shape[self.layouts[of_queries].index("H")], x.shape[1]
        part, group = self._part("heads"), max(heads // max(key_heads, 1), 1)
        local_heads = heads // part.parts
        if local_heads % group and group % max(local_heads, 1):
            wanted = f"such that the {local_heads} query heads of a process read whole groups of {group}, or lie in one"
            raise ValueError(f"{self.op}: the heads of {name} must be {wanted}; found {key_heads} for {heads}")
        return x.narrow(1, part.number * local_heads // group, max(local_heads // group, 1))

    # ------------------------------------------------------------ results

    def as_global(self, local: Tensor) -> DTensor:
        """A result (or its log-sum-exp, which lacks the last axis) as the DTensor of which `local` is a part."""
        axes = self.out[: local.dim()]
        sizes = self._sizes()
        shape = [sizes.get(axis, size) for axis, size in zip(axes, local.shape, strict=True)]
        stride = [1]
        for size in reversed(shape[1:]):
            stride.insert(0, stride[0] * max(size, 1))
        placements = [
            Partial() if what == "channels" else placement
            for what, placement in zip(self.shared, self._placements(axes), strict=True)
        ]
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
        )

    def _sizes(self) -> dict[str, int]:
        """Sizes of all axes in all processes together."""
        sizes = {
            axis: size
            for name in self.layouts
            for axis, size in zip(self.layouts[name], self.arguments[name].shape, strict=True)
        }
        if "rows" in self.shared and not _given(self.arguments, "kv_rows"):  # by which offsets are those of other rows
            offsets = next(x for name in _OFFSETS if isinstance(x := self.arguments.get(name), DTensor))
            sizes["B"] = offsets.shape[0] - self._part("rows").parts
        return sizes


class _Part(NamedTuple):
    """Part `number`, from 0, of `parts`."""

    number: int
    parts: int


def _given(arguments: dict[str, Any], name: str) -> bool:
    return arguments.get(name) is not None


def _form(layout: str, axes: int | None) -> tuple[str, ...]:
    """A layout's axes; of several forms, the one that has so many, or the first."""
    forms = [tuple(form.split()) for form in layout.split("|")]
    return next((form for form in forms if len(form) == axes), forms[0])


def _one_or_all_heads(axis: str, x: Tensor) -> str:
    """The axis of a table that is one head's for all, or has all heads."""
    return axis if axis != "Hb" else "1" if x.shape[0] == 1 else "H"


def _broadcast_axes(x: Tensor, out: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of what broadcasts to the output; an axis of size 1 has no name."""
    axes = (*["1"] * (x.dim() - len(out)), *out)[-x.dim() :] if x.dim() else ()
    return tuple("1" if size == 1 else axis for axis, size in zip(axes, x.shape, strict=True))


def _kind(x: object) -> str:
    return "a plain tensor" if isinstance(x, Tensor) and not isinstance(x, DTensor) else type(x).__name__
