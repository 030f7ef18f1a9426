"""Training by several processes: each takes its rows of every batch, and a step is that of one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from interformer.checks import shown

Items = TypeVar("Items", Tensor, Sequence[Any])


class World(NamedTuple):
    """The processes of a run, and which of them this is; one process alone needs no process group."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> World:
        """The default process group, where one was made."""
        together = dist.is_available() and dist.is_initialized()
        return cls(dist.get_rank(), dist.get_world_size()) if together else cls()

    def share(self, items: Items) -> Items:
        """Every `size`-th of `items`, from this process' own on."""
        return items[self.rank :: self.size]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are means over the processes."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value / self.size

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes."""
        if self.size == 1:
            return items
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, items)
        return [item for part in found for item in part]


def usable(name: str) -> torch.device:
    """The device called `name`.

    Raises:
        ValueError: there is none, or no model can be trained on it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be one that PyTorch knows, as cpu or cuda:0; found {shown(name)}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device must be one that PyTorch can use here; found {shown(name)}, and {count} GPUs")
        return device
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:  # every kind of device has its own
        raise ValueError(f"device must be one that PyTorch can use here; found {shown(name)}") from error
    return device


@contextlib.contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """Among the processes that `torchrun` started, if it did; gives this one's device: of `cuda` its own GPU."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield usable(device)
        return
    own = usable(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield own
    finally:
        dist.destroy_process_group()
