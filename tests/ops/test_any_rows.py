"""Programs and graphs serve any number of rows, 0 and 1 among them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.export import Dim

import interformer_kernels as ik
from interformer_kernels.testing import offsets_of

LENGTHS: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (5,), (2, 2), (0, 0, 1), (3, 0, 7, 1, 5))


class Pool(nn.Module):
    """`pma_pooling` itself, with what it may have."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.seeds, self.gate = nn.Parameter(torch.randn(3, 2, 6)), nn.Parameter(torch.randn(1, 2, 1))
        self.options = options

    def forward(self, x: Tensor, offsets: Tensor) -> Any:
        k = x.unflatten(1, (2, 6))
        return ik.pma_pooling(self.seeds, k, None, offsets, gate=self.gate, **self.options)


class Module(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        found: Tensor = self.module(x, offsets=offsets)
        return found


MODELS: dict[str, Any] = {
    "op": Pool,
    "op, lse": lambda: Pool(return_lse=True),
    "one seed, folded": lambda: Module(ik.nn.PMAPooling(12, 2, fold=True)),
    "seeds, folded": lambda: Module(ik.nn.PMAPooling(12, 2, 3, fold=True)),
    "seeds": lambda: Module(ik.nn.PMAPooling(12, 2, 3, fold=False)),
    "set transformer": lambda: Module(ik.nn.PMAPooling(12, 2, 3, set_transformer=True)),
    "self": lambda: Module(ik.nn.JaggedSelfAttention(12, 2)),
}
FREE = {
    "named": ({0: Dim("T", min=0)}, {0: Dim("B1", min=1)}),
    "two rows": ({0: Dim("T", min=0)}, {0: Dim("B1", min=2)}),
    "auto": ({0: Dim.AUTO}, {0: Dim.AUTO}),
}


def draw(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn(sum(lengths), 12), offsets_of(lengths)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("free", FREE)
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_program_serves_any_rows(name: str, free: str, strict: bool) -> None:
    if strict and free != "auto":
        pytest.skip("strict export with named sizes asks the same questions")
    model = MODELS[name]()
    program = torch.export.export(model, draw((3, 2, 4, 1)), dynamic_shapes=FREE[free], strict=strict).module()
    for lengths in LENGTHS:
        x, offsets = draw(lengths)
        found, wanted = program(x, offsets), model(x, offsets)
        torch.testing.assert_close(found, wanted)
        loss = [y[0] if isinstance(y, tuple) else y for y in (found, wanted)]
        grads = [
            torch.autograd.grad(y.square().sum(), in_order(m), allow_unused=True, materialize_grads=True)
            for y, m in zip(loss, (program, model), strict=True)
        ]
        torch.testing.assert_close(grads[0], grads[1])


def in_order(model: nn.Module) -> list[Tensor]:
    return [value for _, value in sorted(model.named_parameters())]


def graphs(run: Any, train: bool) -> int:
    """How many graphs a function of packed rows is compiled to, over rows and tokens of all small numbers."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    # The first sizes differ from all others in sight: the compiler takes equal sizes for one symbol.
    for lengths in ((9, 4, 2, 5, 1, 3, 2, 8), *reversed(LENGTHS), (1, 0), (0, 0), (0, 0, 0, 0)):
        x, offsets = draw(lengths)
        with torch.set_grad_enabled(train):
            torch.testing.assert_close(compiled(x, offsets), run(x, offsets))
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@functools.cache
def graphs_of_pytorch(train: bool) -> int:
    """How many graphs PyTorch makes of functions that are its own."""
    return graphs(lambda x, offsets: (x * 2, offsets + 1), train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "infer"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_are_those_that_pytorch_makes_of_its_own(name: str, train: bool) -> None:
    """PyTorch compiles anew for 0 or 1 tokens and for a single offset; how many rows there are asks nobody else."""
    assert graphs(MODELS[name](), train) <= graphs_of_pytorch(train)
