"""Runs recorded launches in Triton's interpreter, in a process of its own, and counts the products of each program.

`interpreted(launches)` for a process that compiles kernels; `python -m resources.interpreted FILE` is the other one.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from quick_interpreter import make_quick
from torch import Tensor

from interformer_kernels._triton._run import Launch

Products = list[dict[int, int]]  # of each launch: FLOPs of products of tiles by number of the program


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of an argument, or of all arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for member in value:
            yield from tensors(member)


def interpreted(launches: Sequence[Launch]) -> Products:
    """Run the launches one after another, in place on their tensors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "launches.pt"
        torch.save([_portable(launch) for launch in launches], file)
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "resources.interpreted", str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-4000:])
        changed, products = torch.load(file, weights_only=False)
    for launch, after in zip(launches, changed, strict=True):
        for here, there in zip(tensors(launch.arguments), tensors(after), strict=True):
            here.copy_(there)
    return products  # type: ignore[no-any-return]


def _portable(launch: Launch) -> tuple[Any, ...]:
    function = launch.kernel.fn
    return function.__module__, function.__name__, launch.grid, launch.arguments, launch.constants


def _run(file: str) -> None:
    from triton.runtime import interpreter

    make_quick()
    programs: dict[int, int] = {}
    builder = interpreter.interpreter_builder
    create_dot = builder.create_dot

    def counted(a: Any, b: Any, *others: Any) -> Any:
        program = builder.grid_idx[0]
        programs[program] = programs.get(program, 0) + 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return create_dot(a, b, *others)

    builder.create_dot = counted
    products, changed = [], []
    for module, name, grid, arguments, constants in torch.load(file, weights_only=False):
        programs = {}
        if grid:
            getattr(importlib.import_module(module), name)[(grid,)](*arguments, **constants)
        products.append(programs)
        changed.append(arguments)
    torch.save((changed, products), file)


if __name__ == "__main__":
    _run(sys.argv[1])
