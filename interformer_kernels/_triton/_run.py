"""How kernels are started: on the device, in the interpreter, or only written down for a compiler to see."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interformer_kernels._launch.tensors import allows_tf32
from interformer_kernels._triton._maps import INTERPRETED
from interformer_kernels._triton._tiles import Target, Tiles


class Launch(NamedTuple):
    """One kernel with its grid and arguments: runtime ones by position, then constants by name."""

    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    tiles: Tiles


_written_down: list[Launch] | None = None
_target: Target | None = None


@contextlib.contextmanager
def written_down(target: Target) -> Iterator[list[Launch]]:
    """Nothing is run: what would be started on `target` is listed, for tensors of any device."""
    global _written_down, _target
    _written_down, _target = [], target
    try:
        yield _written_down
    finally:
        _written_down = _target = None


@functools.cache
def _gpu(index: int) -> Target:
    name = torch.cuda.get_device_name(index)
    if torch.version.hip:
        return Target("hip", 0, name)
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", 10 * major + minor, name)


def target_of(x: Tensor) -> Target:
    """The device that the call's kernels are for."""
    if _target is not None:
        return _target
    if x.device.type != "cuda":
        return Target("cpu", 0)
    return _gpu(x.device.index or 0)


def precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: as PyTorch's own matrix products are; on AMD in full."""
    return "tf32" if allows_tf32(dtype) and not torch.version.hip else "ieee"


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are started on the device that holds `x`."""
    if x.device.type != "cuda":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported to serve CPU tensors")
    return torch.cuda.device(x.device)


def start(kernel: Any, grid: int, *arguments: Any, tiles: Tiles, **constants: Any) -> None:
    """Start `grid` programs of a kernel; none where there is no work."""
    if _written_down is not None:
        _written_down.append(Launch(kernel, grid, arguments, constants, tiles))
        return
    if grid == 0:
        return
    if INTERPRETED:
        kernel[(grid,)](*arguments, **constants)
        return
    with on_device_of(next(x for x in arguments if isinstance(x, Tensor))):
        kernel[(grid,)](*arguments, **constants, num_warps=tiles.warps, num_stages=tiles.stages)
