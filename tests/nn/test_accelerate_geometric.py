"""`accelerate` on torch_geometric's Set Transformer: outputs and gradients before and after, with the real library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import module_budget as budget
import pytest
import torch
from module_budget import perturbed, swapped
from torch import Tensor, nn

import interformer_kernels as ik

pytest.importorskip("torch_geometric", reason="torch_geometric (the extra `ecosystem`) is not installed")
from torch_geometric.nn.aggr import SetTransformerAggregation
from torch_geometric.nn.aggr.utils import PoolingByMultiheadAttention

E, H = 16, 4
# Sets of 5, 0, 3, 1 elements, and an empty set after the last element.
INDEX, SETS = torch.tensor([0, 0, 0, 0, 0, 2, 2, 2, 3]), 5


def aggregate(module: Any, inputs: Mapping[str, Any]) -> Tensor:
    return module(inputs["x"], INDEX, dim_size=SETS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_seed_points": 3, "layer_norm": True},
        {"num_encoder_blocks": 2, "num_decoder_blocks": 2, "heads": H, "concat": False},
        {"num_encoder_blocks": 0, "num_decoder_blocks": 0, "num_seed_points": 8, "heads": H},
    ],
    ids=str,
)
def test_set_transformer(options: dict[str, Any], notices: Callable[[], list[str]]) -> None:
    """Empty sets are included; the first three cases pool with folded projections, the last without."""
    before = perturbed(SetTransformerAggregation(E, **options))
    budget.assert_within_budget(before, swapped(before), lambda seed: budget.draw(seed, x=(len(INDEX), E)), aggregate)
    assert not notices()


@pytest.mark.parametrize("kind", budget.PADDINGS)
@pytest.mark.parametrize("layer_norm", [True, False])
def test_pooling(kind: str, layer_norm: bool) -> None:
    before = perturbed(PoolingByMultiheadAttention(E, 3, H, layer_norm))
    tokens = ~budget.padding(kind)

    def run(module: Any, inputs: Mapping[str, Any]) -> Tensor:
        return module(inputs["x"], tokens)

    budget.assert_within_budget(before, swapped(before), lambda seed: budget.draw(seed, x=(3, 6, E)), run)


def test_pooling_without_a_mask() -> None:
    before, x = perturbed(PoolingByMultiheadAttention(E, 3, H)), torch.randn(3, 6, E)
    torch.testing.assert_close(swapped(before)(x), before(x))


def test_other_ways_to_name_sets() -> None:
    """The default is one set; sizes that a batch is padded to are accepted."""
    before, x = perturbed(SetTransformerAggregation(E, heads=H)), torch.randn(len(INDEX), E)
    after = swapped(before)
    torch.testing.assert_close(after(x), before(x))
    arguments = {"index": INDEX, "dim_size": SETS, "max_num_elements": 7}
    torch.testing.assert_close(after(x, **arguments), before(x, **arguments))
    for wrong, error, message in (
        ({"index": INDEX.flip(0)}, ValueError, "not sorted"),
        ({"ptr": torch.tensor([0, 5, 9])}, NotImplementedError, "requires 'index'"),
        ({"index": INDEX, "dim_size": 2}, ValueError, "invalid 'dim_size'"),
    ):
        for module in (before, after):
            with pytest.raises(error, match=message):
                module(x, **wrong)


@pytest.mark.parametrize("case", ["cut sets", "compiled pooling"])
def test_calls_that_take_the_original_path_say_so_once(case: str, notices: Callable[[], list[str]]) -> None:
    if case == "compiled pooling":
        before = perturbed(PoolingByMultiheadAttention(E, 3, H))
    else:
        before = perturbed(SetTransformerAggregation(E, heads=H))
    after = swapped(before)
    call = torch.compile(after, backend="eager") if case == "compiled pooling" else after
    kind = type(before).__name__
    x, cut = torch.randn(len(INDEX), E), {"max_num_elements": 2} if case == "cut sets" else {}

    def run(module: Any) -> Tensor:
        torch.manual_seed(2)
        if case == "compiled pooling":
            return module(X, TOKENS)
        return module(x, INDEX, dim_size=SETS, **cut)

    torch.testing.assert_close(run(call), run(before))
    run(call)
    words = {"cut sets": "max_num_elements"}.get(case, "torch.compile")
    (notice,) = [line for line in notices() if line.startswith(kind)]
    assert notice.startswith(f"{kind} takes torch_geometric's own path")
    assert words in notice


def test_dropout_in_training() -> None:
    after = swapped(perturbed(SetTransformerAggregation(E, heads=H, dropout=0.5))).train()
    x = torch.randn(len(INDEX), E)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return after(x, INDEX, dim_size=SETS)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_compiled(notices: Callable[[], list[str]]) -> None:
    """Elements stay packed throughout, so that compiling changes nothing."""
    after = swapped(perturbed(SetTransformerAggregation(E, heads=H)))
    x = torch.randn(len(INDEX), E)
    compiled = torch.compile(after, backend="eager")
    torch.testing.assert_close(aggregate(compiled, {"x": x}), aggregate(after, {"x": x}))
    assert not notices()


X, TOKENS = torch.randn(3, 6, E), ~budget.padding("holes")


class Readout(nn.Module):
    """A graph model with the aggregation."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.readout = nn.Linear(E, E), SetTransformerAggregation(E, 2, heads=H, layer_norm=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.encode(x).relu(), INDEX, dim_size=SETS)


def test_a_model_travels_and_keeps_its_keys() -> None:
    model = perturbed(Readout())
    keys, parameters = list(model.state_dict()), list(model.parameters())
    report = ik.accelerate(model)
    assert [entry.kind for entry in report.swapped] == [
        "SetTransformerAggregation",
        "MultiheadAttention",
        "PoolingByMultiheadAttention",
        "MultiheadAttention",
        "MultiheadAttention",
    ]
    assert list(model.state_dict()) == keys
    assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True))
    x = torch.randn(len(INDEX), E)
    for way, other in budget.copies(model).items():
        assert torch.equal(other(x), model(x)), way


def test_what_cannot_be_served_is_left() -> None:
    model = SetTransformerAggregation(E)
    model.pma.mab.attn = nn.MultiheadAttention(E, 1, add_zero_attn=True, batch_first=True)
    reasons = {entry.name: entry.why for entry in ik.accelerate(model).left}
    assert reasons[""] == reasons["pma"] == "add_bias_kv or add_zero_attn, which the ops do not support"
