"""Launches of kernels: on the device, in the interpreter, or only recorded for an ahead-of-time compiler."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interformer_kernels._launch.tensors import allows_tf32
from interformer_kernels._triton import _bound
from interformer_kernels._triton._bound import Known, launch
from interformer_kernels._triton._maps import INTERPRETED
from interformer_kernels._triton._tiles import Target, Tiles


class Launch(NamedTuple):
    """One kernel with its grid, its runtime arguments in order, and its constants by name."""

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    tiles: Tiles


_recorded: list[Launch] | None = None
_target: Target | None = None


@contextlib.contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """List the launches that calls would make on `target`, for tensors of any device, instead of making them."""
    global _recorded, _target
    _recorded, _target = [], target
    try:
        yield _recorded
    finally:
        _recorded = _target = None


@functools.cache
def _gpu(index: int) -> Target:
    device = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", 0, device.name, device.multi_processor_count)
    return Target("cuda", 10 * device.major + device.minor, device.name, device.multi_processor_count)


def target_of(x: Tensor) -> Target:
    """The device for which the call's kernels are launched."""
    if _target is not None:
        return _target
    if x.device.type != "cuda":
        return Target("cpu", 0, processors=1)
    return _gpu(x.device.index or 0)


def processors(x: Tensor) -> int:
    """Processors of the device for which the call's kernels are launched."""
    return target_of(x).processors


def stream_of(x: Tensor) -> int:
    """The stream on which the call's kernels are launched."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def precision(dtype: torch.dtype) -> str:
    """Precision of float32 products: as PyTorch's own matrix products have it; on AMD always full."""
    return "tf32" if allows_tf32(dtype) and not torch.version.hip else "ieee"


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any] | None:
    """A context in which kernels are launched on the device that holds `x`; None where they are anyway."""
    if not x.is_cuda:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported to serve CPU tensors")
    return None if x.get_device() == torch.cuda.current_device() else torch.cuda.device(x.device)


def known_to(arguments: tuple[Any, ...], sizes: tuple[int, ...], *options: Hashable) -> Known | None:
    """The kernels known to calls like this one (`_bound.known_to`); None where no kernel is launched on a device."""
    return None if INTERPRETED or _recorded is not None else _bound.known_to(arguments, sizes, *options)


def start(
    kernel: Any, grid: int, *arguments: Any, lead: Tensor, tiles: Tiles,
    known: Known | None = None, form: tuple[Any, ...] = (), **constants: Any,
) -> None:  # fmt: skip
    """Launch `grid` programs of a kernel on the device of `lead`; none where there is no work.

    Launches of calls that are alike find the compiled kernel sooner by what is `known` to these, and by the launch's
    `form` (`_bound.known_to`).
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants, tiles))
        return
    if grid == 0:
        return
    if INTERPRETED:
        kernel[(grid,)](*arguments, **constants)
        return
    context = on_device_of(lead)
    if context is None:
        launch(kernel, grid, arguments, constants, tiles, known, form)
        return
    with context:
        launch(kernel, grid, arguments, constants, tiles, known, form)
