"""Data-parallel training: each process takes its share of every batch, and a step equals that of one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from interformer.checks import short_repr

Items = TypeVar("Items", Tensor, Sequence[Any])


class World(NamedTuple):
    """The rank of this process and the number of processes; a single process needs no process group."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> World:
        """The default process group if there is one, else a single process."""
        has_group = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if has_group else cls()

    def share(self, items: Items) -> Items:
        """Every `size`-th of `items`, starting at this process' rank."""
        return items[self.rank :: self.size]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the processes."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value / self.size

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, ordered by rank."""
        if self.size == 1:
            return items
        by_rank: list[Any] = [None] * self.size
        dist.all_gather_object(by_rank, items)
        return [item for rank_items in by_rank for item in rank_items]


def usable_device(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        ValueError: there is no such device, or PyTorch cannot compute on it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device must be one that PyTorch knows, like cpu or cuda:0; found {short_repr(name)}"
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"device must be one that PyTorch can use here; found {short_repr(name)}, and {count} GPUs"
            )
        return device
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # The type of the error depends on the device.
        raise ValueError(f"device must be one that PyTorch can use here; found {short_repr(name)}") from error
    return device


@contextlib.contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the process group of `torchrun`, if it started this process; yields its device (for `cuda`, its own GPU)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield usable_device(device)
        return
    local_device = usable_device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device)
    if local_device.type == "cuda":
        torch.cuda.set_device(local_device)
    dist.init_process_group("nccl" if local_device.type == "cuda" else "gloo")
    try:
        yield local_device
    finally:
        dist.destroy_process_group()
