"""A stand-in for a GPU in tests: PyTorch's events, streams and memory, with a clock that only work advances."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from interformer_bench import gpu_jobs
from interformer_bench.gpu_place import Place

Record = dict[str, Any]
REHEARSAL = Place("cpu", tiny=True)


def rehearsal_job(name: str) -> gpu_jobs.Job:
    """A tiny job by its name."""
    return next(job for job in gpu_jobs.jobs(tiny=True) if job.name == name)


@dataclass(frozen=True)
class Stand(Place):
    """A place that has graphs, streams and events, and whose tensors lie on the CPU."""

    device: str = "cpu"
    tiny: bool = True

    @property
    def gpu(self) -> bool:
        return True

    def backend(self, named: str) -> str:
        return "cpu"


@dataclass
class FakeGpu:
    """Requests to the GPU in order; its clock in milliseconds; the pending work of its default stream."""

    requests: list[str] = field(default_factory=list)
    clock: float = 0.0
    pending: float = 0.0
    busy: bool = False
    sync_mode: str = "default"
    memory: tuple[int, int] = (100 * 2**30, 139 * 2**30)

    def launch(self, milliseconds: float) -> None:
        """Launch work of this duration, and return at once."""
        self.pending += milliseconds

    def wait(self, *_: object) -> None:
        """Wait until all work is done."""
        self.requests.append("synchronize")
        self.clock += self.pending
        self.pending, self.busy = 0.0, False

    def sleep(self, cycles: int) -> None:
        self.requests.append("sleep")
        self.busy = True

    def mode(self, mode: str) -> None:
        self.sync_mode = mode


def install(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Replace `torch.cuda` by a fake GPU."""
    gpu = FakeGpu()

    class Event:
        at = 0.0

        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = gpu.clock + gpu.pending

        def synchronize(self) -> None:
            gpu.wait()

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Stream:
        def wait_stream(self, stream: object) -> None:
            gpu.requests.append("wait_stream")

        def synchronize(self) -> None:
            gpu.requests.append("wait for a side stream")

        def query(self) -> bool:
            return not gpu.busy

    class Graph:
        def replay(self) -> None:
            gpu.requests.append("replay")

    @contextlib.contextmanager
    def within(context: Any, stream: Any = None) -> Iterator[None]:
        gpu.requests.append(f"begin {type(context).__name__}")
        yield
        gpu.requests.append(f"end {type(context).__name__}")

    fakes: dict[str, Any] = {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": within, "stream": within,
        "synchronize": gpu.wait, "_sleep": gpu.sleep, "current_stream": Stream, "default_stream": Stream,
        "mem_get_info": lambda device=None: gpu.memory, "memory_reserved": lambda device=None: 8 * 2**30,
        "memory_allocated": lambda device=None: 2 * 2**30, "max_memory_allocated": lambda: 3 * 2**30,
        "reset_peak_memory_stats": lambda: None, "empty_cache": lambda: None, "set_sync_debug_mode": gpu.mode,
        "set_stream": lambda stream: gpu.requests.append("set_stream"),
        "is_available": lambda: True,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return gpu
