"""Compiled kernels, found again without Triton's own way to a launch, which takes most of a small call's time.

`JITFunction.run` binds arguments to names, specialises each, writes the compile options into a string, and compares the
globals that a kernel reads with those it was compiled for. Here a compiled kernel is kept under a key that tells apart
at least what Triton does (`_add_arguments`). Triton's own way serves the first launch, a launch that somebody watches,
AMD's devices, and versions of Triton whose launchers are not known to take what `launch` hands them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from interformer_kernels._triton._tiles import Tiles

# AMD's kernels are also specialised by the size of a tensor's memory.
_SERVES = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9) and not torch.version.hip
_INT32 = 2**31
_MOST = 4096  # kernels that are kept


class _Bound(NamedTuple):
    """A compiled kernel: its launcher, what the launcher wants of it, and the constants that follow the arguments."""

    kernel: Any  # kept, so that its id remains its own
    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]


_bound: dict[tuple[Any, ...], _Bound] = {}

# The kernels of calls that are alike, by device, kernel and form.
Known = dict[tuple[Any, ...], _Bound]
_known: dict[tuple[Any, ...], Known] = {}


def known_to(arguments: tuple[Any, ...], sizes: tuple[int, ...], *options: Hashable) -> Known:
    """The kernels of all calls whose launches have equal keys where their kernel and their form are the same.

    So the key of a whole call stands for those of its launches, which need not look at their arguments again. Those
    must follow from these `arguments`, flat integers no larger than `sizes`, and `options`, which say all that is
    compiled in; but for memory that torch has just allocated, which begins at a multiple of 16 bytes.
    """
    parts: list[Any] = [*options, sizes if max(sizes) >= _INT32 else int]
    _add_arguments(parts.append, arguments)
    key = tuple(parts)
    known = _known.get(key)
    if known is None:
        if len(_known) >= _MOST:
            _known.clear()
        known = _known[key] = {}
    return known


def launch(
    kernel: Any, grid: int, arguments: tuple[Any, ...], constants: dict[str, Any], tiles: Tiles,
    known: Known | None = None, form: tuple[Any, ...] = (),
) -> None:  # fmt: skip
    """Launch `grid` programs of a kernel on the current device, compiled as `tiles` say.

    What calls alike have `known` is taken from there. Where their launches of a kernel may be compiled differently, its
    `form` tells these apart.
    """
    if not _SERVES or _is_watched(kernel):
        kernel[(grid,)](*arguments, **constants, **tiles.options)
        return
    active = driver.active
    device = active.get_current_device()
    place = active, device, id(kernel), form
    bound = None if known is None else known.get(place)
    if bound is None:
        key = active, device, tiles, *key_of(kernel, arguments, constants)
        bound = _bound.get(key)
        if bound is None:
            compiled = kernel[(grid,)](*arguments, **constants, **tiles.options)
            if _can_repeat(kernel, compiled, arguments, constants):
                _keep(key, kernel, compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :]))
            return
        if known is not None:
            known[place] = bound
    stream = active.get_current_stream(device)
    # Launch metadata and hooks are for those who watch.
    bound.run(grid, 1, 1, stream, bound.function, bound.metadata, None, None, None, *arguments, *bound.constants)


def key_of(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """The key that tells apart launches of kernels on one device, but for tiles."""
    parts = [id(kernel), *constants, *constants.values()]
    _add_arguments(parts.append, arguments)
    return tuple(parts)


def _keep(key: tuple[Any, ...], kernel: Any, compiled: Any, constants: tuple[Any, ...]) -> None:
    if len(_bound) >= _MOST:  # of layouts whose strides follow from the number of tokens, say
        _bound.clear()
    _bound[key] = _Bound(kernel, compiled.run, compiled.function, compiled.packed_metadata, constants)


def _is_watched(kernel: Any) -> bool:
    """Whether hooks, or settings for debugging, ask for Triton's own way."""
    runtime = knobs.runtime
    return bool(
        kernel.pre_run_hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or getattr(runtime.launch_enter_hook, "calls", True)  # maybe set to something else than a chain of hooks
        or getattr(runtime.launch_exit_hook, "calls", True)
        or knobs.compilation.instrumentation_mode
    )


def _add_arguments(add: Callable[[Any], None], arguments: tuple[Any, ...], flat: bool = True) -> None:
    """Add to a key all that Triton specialises arguments by, or members of a tuple of theirs.

    Of a flat integer that is only the width that it needs; tensors count by dtype, and by the alignment of their first
    number.
    """
    for x in arguments:
        kind = type(x)
        if x is None or kind is float:
            add(kind)
        elif kind is Tensor or isinstance(x, Tensor):
            add(x.dtype)
            add(x.data_ptr() % 16)
        elif isinstance(x, tuple):
            add(_of_tuple(x))
        elif flat and kind is int:
            add(int if -_INT32 <= x < _INT32 else x)
        else:
            add(kind)
            add(x)


def _of_tuple(members: tuple[Any, ...]) -> tuple[Any, ...]:
    """The part of a key for a tuple; Triton tells integers in it apart by less than their values."""
    count = len(members)
    if count > 1 and type(members[1]) is int and type(x := members[0]) is Tensor:
        # A tensor with its strides. `_can_repeat` sees to it that there is no other tensor.
        return type(members), x.dtype, x.data_ptr() % 16, members[1:]
    parts: list[Any] = [type(members), count]
    # Most options of a call are not used: those at the end are passed over.
    while count and members[count - 1] is None:
        count -= 1
    _add_arguments(parts.append, members[:count], flat=False)
    return tuple(parts)


def _can_repeat(kernel: Any, compiled: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> bool:
    """Whether the key holds all that this kernel was compiled for, and `launch` can put its arguments in order."""
    flat = [param.do_not_specialize for x, param in zip(arguments, kernel.params, strict=False) if type(x) is int]
    in_order = kernel.arg_names[len(arguments) :]
    return (
        isinstance(compiled, CompiledKernel)
        and all(flat)
        and all(_strides_are_numbers(x) for x in arguments if isinstance(x, tuple))
        and sorted(in_order) == sorted(constants)
    )


def _strides_are_numbers(members: tuple[Any, ...]) -> bool:
    """Whether no tuple has a tensor where the key takes strides by their values."""
    if len(members) > 1 and type(members[1]) is int and type(members[0]) is Tensor:
        return all(type(x) is int for x in members[1:])
    return all(_strides_are_numbers(x) for x in members if isinstance(x, tuple))
