"""Argument checks that two or more operations share: each message names the argument, what was wanted and what came."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import _backend
from interformer_kernels._calls import FFN_ACTIVATIONS as FFN_ACTIVATIONS
from interformer_kernels._calls import GATE_ACTIVATIONS as GATE_ACTIVATIONS
from interformer_kernels._calls import GATE_FORMS as GATE_FORMS
from interformer_kernels._calls import SCORES as SCORES

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
VALIDATION_LEVELS = ("off", "default", "full")

_validation = "default"


def set_validation(level: str) -> str:
    """Choose when the *contents* of offsets and rotary positions are checked; returns the level that was in force.

    Shapes, dtypes and devices are always checked. Contents are data: on a GPU, reading them stalls the stream.

    - `"default"`: checked on CPU, trusted elsewhere.
    - `"full"`: checked on every device.
    - `"off"`: trusted everywhere. Kernels still clamp each row to the tensor, so nothing is read out of bounds.
    """
    global _validation
    check_choice("set_validation", "level", level, VALIDATION_LEVELS)
    previous, _validation = _validation, level
    return previous


def validates(device: torch.device) -> bool:
    """Whether the contents of index tensors on this device are to be checked."""
    return _validation == "full" or (validates_cpu() and device.type == "cpu")


def validates_cpu() -> bool:
    """Whether the contents of index tensors on the CPU are to be checked."""
    return _validation != "off"


# ---------------------------------------------------------------- kinds, shapes, values


def autocast_dtype(lead: object) -> torch.dtype | None:
    """The dtype that floating tensors are cast to on `lead`'s device; None where autocast is off."""
    device = lead.device.type if isinstance(lead, Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):  # tensors without contents have no autocast
        return None
    return torch.get_autocast_dtype(device)


def autocast(x: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in `dtype`; float64, and anything else, is left as it is, as PyTorch does."""
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype in eligible else x


_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 60
_LONGEST = 160


def describe(value: object) -> str:
    """A value as the "found" half of a message: one line of bounded length, whatever the value."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"a nested tensor of layout {value.layout} and {value.dtype} on {value.device}"
        layout = "" if value.layout is torch.strided else f" of layout {value.layout}"
        return f"a tensor {list(value.shape)}{layout} of {value.dtype} on {value.device}"
    kind = type(value).__name__
    if isinstance(value, int) and abs(value) >= 2**128:  # Python itself refuses to print longer ones
        return f"an int of {value.bit_length()} bits"
    if getattr(value, "shape", None) and hasattr(value, "dtype"):  # an array, whose numbers tell nothing
        return f"an array of {value.dtype} ({kind})"
    try:
        text = " ".join(_shortened.repr(value).split())
    except Exception:  # somebody's `__repr__`, or a long int inside
        text = "a value that cannot be printed"
    return f"{text if len(text) <= _LONGEST else text[:_LONGEST] + '...'} ({kind})"


def is_dense(x: object) -> bool:
    """Whether `x` is an ordinary tensor: not nested, sparse, of another layout, or quantized."""
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested and not x.is_quantized


def plain(op: str, name: str, value: Any) -> Any:
    """A numpy scalar, or a tensor without axes, as Python's own number; anything else as it is.

    Of a GPU's tensor this waits for it, as every use of a number on the host does.
    """
    if isinstance(value, (bool, int, float, str, torch.SymInt)):
        return value
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested or value.dim() or value.is_meta:
            return value
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} must not require gradients, which it does not get; detach it")
        return value.item()
    numpy = sys.modules.get("numpy")
    return value.item() if numpy is not None and isinstance(value, numpy.generic) else value


def check_floats(op: str, first: str, tensors: dict[str, object]) -> None:
    """Every given tensor (None is passed over) is floating, and shares dtype and device with the one named `first`."""
    lead = tensors[first]
    for name, x in ((first, lead), *tensors.items()):
        if x is None and x is not lead:
            continue
        if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES or not is_dense(x):
            sparse = "" if not isinstance(x, Tensor) or is_dense(x) else "dense "
            wanted = f"a {sparse}tensor of float32, bfloat16, float16 or float64"
            raise TypeError(f"{op}: {name} must be {wanted}, found {describe(x)}")
        assert isinstance(lead, Tensor)
        if x.dtype != lead.dtype:
            raise TypeError(f"{op}: {name} must have {first}'s dtype {lead.dtype}, found {x.dtype}")
        if x.device != lead.device:
            raise ValueError(f"{op}: {name} must be on {first}'s device {lead.device}, found {x.device}")


def check_index_kind(op: str, name: str, x: object) -> Tensor:
    """An int32 or int64 tensor."""
    if not isinstance(x, Tensor) or x.dtype not in INDEX_DTYPES or not is_dense(x):
        raise TypeError(f"{op}: {name} must be an int32 or int64 tensor, found {describe(x)}")
    return x


def check_index(op: str, name: str, x: object, device: torch.device) -> Tensor:
    """A one-dimensional int32 or int64 tensor on `device`."""
    x = check_index_kind(op, name, x)
    if x.dim() != 1:
        raise ValueError(f"{op}: {name} must have one axis, found shape {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on the values' device {device}, found {x.device}")
    return x


def check_offsets(op: str, name: str, offsets: object, device: torch.device) -> int:
    """Offsets `[B+1]` by kind and shape (not content); returns `B`."""
    x = check_index(op, name, offsets, device)
    if x.shape[0] < 1:
        raise ValueError(f"{op}: {name} must be [B+1] with at least one entry, found shape {list(x.shape)}")
    return x.shape[0] - 1


class Axes:
    """The named axes of one call: the first tensor that shows an axis fixes its size, later ones must agree."""

    def __init__(self, op: str, **sizes: int) -> None:
        self.op = op
        self.sizes: dict[str, int] = sizes

    def bind(self, name: str, x: Tensor, axes: Sequence[str]) -> None:
        """Check that `x` is a tensor with just these axes; sizes not known yet are taken from it."""
        if not is_dense(x):
            raise TypeError(f"{self.op}: {name} must be a dense tensor [{', '.join(axes)}], found {describe(x)}")
        shape, sizes = x.shape, self.sizes
        if len(shape) == len(axes):
            for axis, size in zip(axes, shape, strict=True):
                if sizes.get(axis, size) != size:
                    break
            else:
                sizes.update(zip(axes, shape, strict=True))
                return
        known = ", ".join(f"{axis} = {self.sizes[axis]}" for axis in axes if axis in self.sizes)
        wanted = f"[{', '.join(axes)}]" + (f" with {known}" if known else "")
        raise ValueError(f"{self.op}: {name} must be {wanted}, found shape {list(x.shape)}")

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]


def check_heads(op: str, axes: Mapping[str, int]) -> None:
    """Sizes that division rests on: at least one channel and head, query heads a multiple of key/value heads."""
    for axis in ("D", "Dv", "H", "Hk"):
        if axes[axis] < 1:
            raise ValueError(f"{op}: axis {axis} must be at least 1, found {axes[axis]}")
    if axes["H"] % axes["Hk"]:
        wanted = f"a multiple of the {axes['Hk']} key/value heads"
        raise ValueError(f"{op}: the number of query heads must be {wanted}, found {axes['H']}")


def check_broadcasts(op: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """`x` broadcasts to `shape`, the output's."""
    fits = x.dim() <= len(shape) and all(
        have in (want, 1) for have, want in zip(reversed(x.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must broadcast to the output's shape {list(shape)}, found {list(x.shape)}")


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """`value` is one of the strings."""
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be a string, one of {', '.join(choices)}; found {describe(value)}")
    if value not in choices:
        found = repr(value) if len(value) < 60 else describe(value)
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}; found {found}")


def check_window(op: str, window: object) -> tuple[int, int]:
    """The pair `(left, right)`, each an int of at least -1; cut where a position added to it would overflow."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"{op}: window must be a pair (left, right) of ints, found {describe(window)}")
    left, right = window
    if not (type(left) is type(right) is int and left >= -1 and right >= -1):
        left, right = (check_count(op, f"window[{i}]", side, least=-1, most=None) for i, side in enumerate(window))
    return min(left, 2**62), min(right, 2**62)


def check_bool(op: str, name: str, value: object) -> bool:
    """`value` is a bool, or a numpy or tensor scalar of one; returns it as a bool."""
    value = plain(op, name, value)
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, found {describe(value)}")
    return value


def check_count(op: str, name: str, value: object, least: int = 0, most: int | None = 2**63 - 1) -> Any:
    """`value` is an int from `least` to `most`, or a numpy or tensor scalar of one; returns it as an int."""
    value = plain(op, name, value)
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, found {describe(value)}")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, found {describe(value)}")
    if most is not None and isinstance(value, int) and value > most:
        raise ValueError(f"{op}: {name} must be at most {most}, found {describe(value)}")
    return value


def check_number(op: str, name: str, value: object) -> float:
    """`value` is a finite number, Python's or a numpy or tensor scalar; returns it as a float."""
    value = plain(op, name, value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a number, found {describe(value)}")
    # Literals: math.isfinite takes no long ints and cannot be traced, and a name would be one more input of the graph.
    if not -1.7976931348623157e308 <= value <= 1.7976931348623157e308:
        found = value if isinstance(value, float) else describe(value)
        raise ValueError(f"{op}: {name} must be finite, found {found}")
    return float(value)


def check_within(op: str, name: str, value: object, least: float, most: float) -> float:
    """`value` is a number from `least` to `most`; returns it as a float."""
    number = check_number(op, name, value)
    if not least <= number <= most:
        wanted = f"from {least:g} to {most:g}" if most < 1e308 else f"at least {least:g}"
        raise ValueError(f"{op}: {name} must be {wanted}, found {number}")
    return number


def check_rope(op: str, rope: object, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rotary tables `(cos, sin)`, each float32 `[P, R/2]` with `P >= 1` and `R <= D`."""
    if not isinstance(rope, (tuple, list)) or len(rope) != 2:
        raise TypeError(f"{op}: rope must be a pair (cos, sin) of tensors, found {describe(rope)}")
    cos, sin = rope
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, Tensor) or table.dtype != torch.float32 or not is_dense(table):
            raise TypeError(f"{op}: rope's {name} must be a float32 tensor, found {describe(table)}")
        if table.dim() != 2 or table.shape[0] < 1 or not 1 <= table.shape[1] <= head_size // 2:
            wanted = f"[P, R/2] with P >= 1 and R <= D = {head_size}"
            raise ValueError(f"{op}: rope's {name} must be {wanted}, found shape {list(table.shape)}")
        if table.device != device:
            raise ValueError(f"{op}: rope's {name} must be on the values' device {device}, found {table.device}")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: rope's {name} must not require gradients, for the tables get none: detach it")
    if cos.shape != sin.shape:
        raise ValueError(f"{op}: rope's sin must have cos's shape {list(cos.shape)}, found {list(sin.shape)}")
    return cos, sin


def check_lse(op: str, score: str, return_lse: object) -> bool:
    """Whether the log-sum-exp is asked, which only a softmax has."""
    asked = check_bool(op, "return_lse", return_lse)
    if asked and score != "softmax":
        raise ValueError(f'{op}: return_lse must be False unless score="softmax", found True with score={score!r}')
    return asked


def check_residual(op: str, residual: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A residual that broadcasts to the output's shape, as a view of it; autograd sums its gradient accordingly."""
    if residual is None:
        return None
    check_broadcasts(op, "residual", residual, shape)
    same = residual.dim() == len(shape) and all(h == w for h, w in zip(residual.shape, shape, strict=True))
    return residual if same else residual.expand(shape)


def backend_name(op: str, backend: object) -> str:
    """A backend's name as the registered ops take it: `""` stands for the fastest that can serve."""
    if backend is None:
        return ""
    check_choice(op, "backend", backend, _backend.BACKENDS)
    assert isinstance(backend, str)
    return backend


# ---------------------------------------------------------------- contents (data, so checked inside the ops)


def first_bad_offset(offsets: Tensor, total: int) -> int:
    """Index of the first entry of `offsets` that breaks their contract (start, order, end); -1 where none does."""
    module = _backend.native()
    if module is not None and offsets.device.type == "cpu":
        return int(module.first_bad_offset(offsets, total))
    low = torch.cat((offsets.new_zeros(1), offsets[:-1]))
    wrong = (offsets < low) | (offsets > total)
    wrong[0] = offsets[0] != 0
    return int(wrong.int().argmax()) if bool(wrong.any()) else -1


def check_offsets_content(op: str, name: str, offsets: Tensor, total: int) -> None:
    """Offsets start at 0, never decrease and stay within the `total` tokens."""
    if not validates(offsets.device):
        return
    bad = first_bad_offset(offsets, total)
    if bad < 0:
        return
    value = int(offsets[bad])
    if bad == 0 and value != 0:
        wanted = "0"
    elif bad > 0 and value < (before := int(offsets[bad - 1])):
        wanted = f"at least {before}, the entry before it"
    else:
        wanted = f"at most {total}, the number of tokens"
    raise ValueError(f"{op}: {name}[{bad}] must be {wanted}, found {value}")


def check_positions_content(op: str, name: str, positions: Tensor, offsets: Tensor, table_rows: int) -> None:
    """Positions of the tokens that belong to rows lie in `[0, P)`."""
    if not validates(positions.device):
        return
    used = positions[: int(offsets[-1])]
    wrong = (used < 0) | (used >= table_rows)
    if wrong.any():
        bad = int(wrong.nonzero()[0])
        raise ValueError(f"{op}: {name}[{bad}] must lie in [0, P = {table_rows}), found {int(used[bad])}")


def check_rows_fit_tables(op: str, name: str, offsets: Tensor, table_rows: int) -> None:
    """No row is longer than the rotary tables, whose positions are the indices in the row."""
    if not validates(offsets.device) or offsets.shape[0] < 2:
        return
    longest = int(offsets.diff().max())
    if longest > table_rows:
        raise ValueError(f"{op}: rows of {name} must have at most P = {table_rows} tokens, found {longest}")
