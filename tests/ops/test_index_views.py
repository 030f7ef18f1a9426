"""Index tensors of any stride mean the numbers that they show: on every backend, compiled and exported."""

from __future__ import annotations

from typing import Any

import index_views
import pytest
import torch
from grid import over_cases
from torch import Tensor

from interformer_kernels import testing
from interformer_kernels.testing import Case


def _results(case: Case, inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    return testing.evaluate(lambda: testing.call(case.op, inputs, backend), case.op, inputs)


@over_cases(index_views.CASES)
def test_strides_of_index_tensors(backend: str, case: Case) -> None:
    for view, plain in index_views.pairs(testing.make_inputs(case, torch.float32)):
        found = _results(case, view, backend)
        for quantity, x in _results(case, plain, backend).items():
            assert torch.equal(found[quantity], x), quantity


class _Call(torch.nn.Module):
    """A case's public function; tensors are arguments, everything else stays as it is."""

    def __init__(self, case: Case, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.rest = case.op, {name: x for name, x in inputs.items() if not isinstance(x, Tensor)}

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return testing.call(self.op, {**self.rest, **tensors}, None)[0]


@pytest.mark.parametrize("how", ["compiled", "exported"])
@pytest.mark.parametrize("case", index_views.CASES, ids=lambda case: f"{case.op}-{case.name}")
def test_strides_of_index_tensors_in_graphs(how: str, case: Case) -> None:
    for view, plain in index_views.pairs(testing.make_inputs(case, torch.float32)):
        module = _Call(case, view)
        tensors, contiguous = ({n: x.detach() for n, x in call.items() if isinstance(x, Tensor) and n != "grad_out"}
                               for call in (view, plain))  # fmt: skip
        if how == "compiled":
            torch._dynamo.reset()
            run = torch.compile(module, fullgraph=True, backend="aot_eager")
        else:
            run = torch.export.export(module, (tensors,)).module()
        assert torch.equal(run(tensors), _Call(case, plain)(contiguous))
