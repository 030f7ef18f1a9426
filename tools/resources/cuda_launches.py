"""Launches of the CUDA kernels at a shape, as the emulation of `tests/emulated` lists them, and their bounds.

Its module makes the very launches of the CUDA part, with all arguments as they lie in memory, for tensors on the CPU.
`bounds.py` judges them by the machine code of `cuda_code.py`. A persistent launch is walked as if each of its items had
a block of its own; that a block goes on to another item is left out.
"""

from __future__ import annotations

import random
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resources import bounds, cuda_code
from resources.bounds import Bounds
from resources.machine_code import LANES
from resources.shapes import Shape, call_of
from resources.walk import Kernel, Machine, Walked

_EMULATED = cuda_code.ROOT / "tests" / "emulated"
_UNWRITTEN = 0x3FFFFFFF  # no item has this number, so a block whose next one is not known ends
_RESIDENT = 3 * bounds.PROCESSORS  # blocks at once, which persistent launches ask for
_LAST = 2**24  # more items than any launch has


class CudaLaunch(NamedTuple):
    name: str
    blocks: int
    threads: int
    shared: int
    arguments: bytes
    indices: list[tuple[int, int]]  # where integer tensors lie
    bytes: int  # of all tensors of the call


class _Kept(TorchDispatchMode):
    """Keeps all tensors that a call makes, so that no memory is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.made.append(result)
        return result


def record(shape: Shape, training: bool) -> tuple[list[CudaLaunch], list[Tensor]]:
    """The launches of a forward, or of the backward that follows it, and the tensors that must live to walk them."""
    sys.path.insert(0, str(_EMULATED))
    import emulation
    from memory import names_of

    module = emulation.load()
    emulation.install(module)
    from interformer_kernels._cuda import attention, personalized_ffn

    kept = _Kept()
    module.configure(0, True, resident=_RESIDENT)
    with kept:
        call = call_of(shape, torch.bfloat16)
        module.list_launches(True)
        if shape.op == "ffn":
            out = personalized_ffn.forward(call, None)
            if training:
                module.list_launches(True)
                personalized_ffn.backward(call, out)
        else:
            out, lse, attn_out = attention.forward(call, None, training)
            if training:
                module.list_launches(True)
                attention.backward(call, out, attn_out, lse)
        listed = module.launches()
        module.list_launches(False)
    module.configure(0, True)
    sizes = {x.data_ptr(): x.numel() * x.element_size() for x in kept.made}
    indices = [(x.data_ptr(), x.data_ptr() + sizes[x.data_ptr()]) for x in kept.made if not x.is_floating_point()]
    names = names_of(str(module.__file__))
    return [
        CudaLaunch(names[kernel], blocks, threads, shared, arguments, indices, sum(sizes.values()))
        for kernel, blocks, threads, shared, arguments in listed
    ], kept.made


def _items(way: Kernel, machine: Machine, blocks: int) -> int:
    """Blocks that have work if each item has its own; those behind the last end at once."""
    end = way.walk(machine, _LAST).names
    low, high = 0, _LAST
    while low < high:
        middle = (low + high) // 2
        if way.walk(machine, middle).names == end:
            high = middle
        else:
            low = middle + 1
    return max(low, 1) if low else blocks


def bounds_of(launch: CudaLaunch, sample: int = bounds.SAMPLE) -> Bounds:
    """Bounds of one launch on the whole device."""
    code = cuda_code.code_of(launch.name)
    constants = bytes(bounds.head_of_constants(launch.threads, launch.blocks)) + launch.arguments + bytes(64)
    machine = Machine(constants, launch.indices, launch.threads, launch.blocks, _UNWRITTEN)
    way, warps = Kernel(code.instructions), launch.threads // LANES
    items = _items(way, machine, launch.blocks) if launch.blocks > 1 else 1
    draw = random.Random(0)
    step = max(1.0, items / sample)
    numbers = [min(items - 1, int((i + draw.random()) * step)) for i in range(min(items, sample))]
    ways: list[Walked] = [way.walk(machine, number, LANES * draw.randrange(warps)) for number in numbers]
    resident = bounds.resident_programs(code.registers, launch.shared, warps)
    return bounds.bounds_from(launch.name, items, ways, warps, resident, launch.bytes)
