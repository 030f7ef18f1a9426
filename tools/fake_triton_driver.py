"""Triton's own launch path on a machine without a GPU: kernels are specialised and compiled, and launches do nothing.

After `install("sm_90")` the package's Triton backend serves CPU tensors: a call goes through all of the launchers and
of Triton's just-in-time path (binding, specialisation, cache, compiler) up to the launch itself. Results are
uninitialised memory. These are all the methods that Triton 3.6 and 3.9 call on a driver.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from resources import triton_kernels
from triton.runtime import driver

from interformer_kernels import _backend
from interformer_kernels._triton import _run


class _Utils:
    """The part of a driver that loads kernels and knows the device."""

    def __init__(self, shared: int) -> None:
        self.shared = shared

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, and threads of a block at most."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared, "multiprocessor_count": 132, "warpSize": 32}


class FakeDriver:
    """One device of a target; it counts the launches that it swallowed, and keeps the latest: hash and arguments."""

    def __init__(self, target: str) -> None:
        _, self.target = triton_kernels.TARGETS[target]
        self.utils = _Utils(triton_kernels.SHARED_MEMORY[target])
        self.launches = 0
        self.latest: tuple[str, tuple[Any, ...]] = ("", ())
        self.watch: Callable[[Any, tuple[Any, ...]], None] | None = None  # gets metadata and arguments of launches

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*arguments: Any) -> None:
            self.launches += 1
            self.latest = metadata.hash, arguments
            if self.watch is not None:
                self.watch(metadata, arguments)

        return launch

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@functools.cache
def install(target: str) -> FakeDriver:
    """Make Triton compile for this target of `triton_kernels.TARGETS`; from now on this process launches nothing."""
    fake = FakeDriver(target)
    driver.set_active(fake)
    kernels_for, _ = triton_kernels.TARGETS[target]
    _run.target_of = lambda x: kernels_for
    _run.on_device_of = lambda x: None
    _backend._DEVICES["triton"] = "cpu"
    return fake


# ---------------------------------------------------------------- compiled kernels


class Compiled(NamedTuple):
    """A kernel in Triton's cache: registers and spilled bytes of a thread, bytes of shared memory of a program."""

    name: str
    registers: int
    spills: int
    shared: int
    warps: int


def compiled_in(cache: Path) -> Iterator[Compiled]:
    """All kernels for NVIDIA GPUs in a cache folder."""
    for cubin in sorted(cache.glob("*/*.cubin")):
        metadata = json.loads(cubin.with_suffix(".json").read_text())
        arch = metadata["target"]["arch"]
        registers, spills = triton_kernels.usage_of_cubin(cubin, cubin.with_suffix(".ptx"), arch)
        yield Compiled(cubin.stem, registers, spills, metadata["shared"], metadata["num_warps"])
