"""Two modules with the same parameters: outputs and gradients of the second within the first's budget (docs/ops.md).

The first in float64 is the truth; the first in float32 is eager PyTorch, whose error determines the budget.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from every import most_draws
from torch import Tensor, nn

import interformer_kernels
from interformer_kernels import testing

Inputs = dict[str, Any]
Run = Callable[[Any, Mapping[str, Any]], Tensor]

# Padding masks of three rows of six positions, True at padding.
PADDINGS = {
    "right": ((0, 0, 0, 1, 1, 1), (0, 0, 0, 0, 0, 1), (0, 0, 0, 0, 0, 0)),
    "left": ((1, 1, 1, 0, 0, 0), (1, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)),
    "both sides": ((1, 1, 0, 0, 1, 1), (1, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1)),
    "holes": ((0, 1, 0, 1, 1, 0), (1, 0, 0, 1, 0, 0), (0, 0, 0, 0, 0, 0)),
    "a row of padding": ((1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 1, 1), (0, 0, 0, 0, 0, 0)),
}
ROWS, WIDTH = 3, 6


def padding(kind: str) -> Tensor:
    """The padding mask of this kind, bool `[3, 6]`."""
    return torch.tensor(PADDINGS[kind], dtype=torch.bool)


def perturbed(module: Any, by: float = 0.2) -> Any:
    """The module with all parameters perturbed: biases are initialised to zero, which would hide errors."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += by * torch.randn_like(parameter)
    return module


def swapped(module: Any) -> Any:
    """An accelerated copy of the module."""
    result = copy.deepcopy(module)
    interformer_kernels.accelerate(result)
    return result


def draw(seed: int, **shapes: tuple[int, ...]) -> Inputs:
    """Normal random leaves of these shapes that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def assert_within_budget(
    before: nn.Module,
    after: nn.Module,
    make: Callable[[int], Inputs],
    run: Run,
    max_draws: int = 24,
) -> None:
    """Check that `run(after, inputs)` and its gradients agree with those of `before`, over draws `make(seed)`.

    With EVERY=1 there are as many draws as the rule of `testing.compare` needs; else quantities for which `max_draws`
    are not enough are not judged.
    """
    exact = copy.deepcopy(before).double()
    rows = testing.judge(
        testing.pooled(lambda seed: _measure(before, after, exact, make(seed), run), 0, most_draws(max_draws))
    )
    assert rows
    assert not [row for row in rows if not row.ok]


def evaluate(module: nn.Module, inputs: Inputs, run: Run) -> dict[str, Tensor]:
    """The output and the gradients of inputs and parameters, by name, checked to be finite."""
    out = run(module, inputs)
    result = {"out": out.detach()}
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    named = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    named.update((name, x) for name, x in module.named_parameters() if x.requires_grad)
    grads = torch.autograd.grad(out, list(named.values()), weights, allow_unused=True, materialize_grads=True)
    result.update({f"d {name}": grad for name, grad in zip(named, grads, strict=True)})
    for name, x in result.items():
        assert x.isfinite().all(), name
    return result


def _measure(before: nn.Module, after: nn.Module, exact: nn.Module, inputs: Inputs, run: Run) -> testing.Errors:
    result, eager = evaluate(after, inputs, run), evaluate(before, inputs, run)
    truth = evaluate(exact, testing.cast_inputs(inputs, torch.float64), run)
    assert result.keys() == truth.keys()
    return {name: testing.Sums.of(x, eager[name], truth[name]) for name, x in result.items()}


def copies(module: nn.Module) -> dict[str, nn.Module]:
    """Copies of the module by deepcopy, pickle and `torch.save`."""
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    return {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "torch.save": torch.load(saved, weights_only=False),
    }
