"""Processes of one process group on the CPU, two by default, that run several functions in one start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2


def run_together(works: Sequence[Callable[[], Any]], folder: Path, world: int = WORLD) -> list[dict[str, Any]]:
    """The result of every function, by its name, in each process; starting a process takes seconds."""
    torch.multiprocessing.spawn(_process, (works, folder, world), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _process(rank: int, works: Sequence[Callable[[], Any]], folder: Path, world: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        torch.save({work.__name__: work() for work in works}, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
