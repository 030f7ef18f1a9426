"""`accelerate` on whole models: its report, unchanged attributes, copying and saving, user-defined adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import module_budget as budget
import pytest
import torch
from module_budget import perturbed, swapped
from torch import Tensor, nn

import interformer_kernels as ik
from interformer_kernels.jagged import from_padded
from interformer_kernels.nn import accelerate

E, H = 16, 4


class Sub(nn.MultiheadAttention):
    """A user's subclass of attention, whose forward is unknown."""


class Model(nn.Module):
    """A model of several kinds of modules, some of which cannot be swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, E)
        layer = nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E))
        self.pool = nn.MultiheadAttention(E, H, batch_first=True)
        self.own = Sub(E, H)
        self.zero = nn.MultiheadAttention(E, H, add_zero_attn=True)
        self.query = nn.Parameter(torch.randn(1, 1, E))

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        x = self.encoder(self.embed(ids), src_key_padding_mask=padding)
        query = self.query.expand(len(ids), -1, -1)
        return self.pool(query, x, x, key_padding_mask=padding, need_weights=False)[0]


SWAPPED = ["encoder", "encoder.layers.0", "encoder.layers.0.self_attn"]
SWAPPED += ["encoder.layers.1", "encoder.layers.1.self_attn", "pool"]


def test_the_report_lists_every_module() -> None:
    model = Model()
    classes = [type(module) for module in model.modules()]
    dry = ik.accelerate(model, dry_run=True)
    assert [type(module) for module in model.modules()] == classes
    report = ik.accelerate(model)
    assert (report.entries, dry.dry_run, report.dry_run) == (dry.entries, True, False)
    assert [entry.name for entry in report.entries] == [name for name, _ in model.named_modules()]
    assert [entry.name for entry in report.swapped] == SWAPPED
    reasons = {entry.name: entry.why for entry in report.left}
    assert reasons["own"].startswith("a subclass of MultiheadAttention, whose forward may differ")
    assert reasons["zero"] == "add_bias_kv or add_zero_attn, which the ops do not support"
    assert reasons["embed"] == reasons[""] == "no adapter is registered for this class"
    lines = str(report).splitlines()
    assert lines[0] == f"6 of {len(classes)} modules swapped"
    assert "  swapped: pool (MultiheadAttention)" in lines
    assert "  left: 1 Embedding: no adapter is registered for this class" in lines
    assert "would be swapped: pool" in str(dry)
    second_report = ik.accelerate(model)
    assert not second_report.swapped
    assert {entry.why for entry in second_report.entries if entry.name in SWAPPED} == {"it is swapped already"}


def test_a_model_trains_as_before() -> None:
    """Parameters, keys, hooks and the optimizer's references to them stay, and a whole model's gradients agree."""
    before = perturbed(Model())
    after = copy.deepcopy(before)
    parameters, keys = list(after.parameters()), list(after.state_dict())
    optimizer, hook_calls = torch.optim.SGD(after.parameters(), 1e-4), []
    after.pool.register_forward_hook(lambda *call: hook_calls.append(call))
    ik.accelerate(after)
    assert list(after.state_dict()) == keys
    assert all(x is y for x, y in zip(after.parameters(), parameters, strict=True))
    assert isinstance(after.pool, nn.MultiheadAttention)
    padding = budget.padding("right")

    def make(seed: int) -> budget.Inputs:
        return {"ids": torch.randint(10, (3, 6), generator=torch.Generator().manual_seed(seed))}

    budget.assert_within_budget(before, after, make, lambda module, inputs: module(inputs["ids"], padding))
    assert hook_calls
    ids = make(0)["ids"]
    start = after(ids, padding).square().sum()
    start.backward()
    optimizer.step()
    assert after(ids, padding).square().sum() < start


def test_accelerated_models_travel() -> None:
    model = swapped(perturbed(Model()))
    ids, padding = torch.arange(18).view(3, 6) % 10, budget.padding("holes")
    fresh = Model()
    fresh.load_state_dict(model.state_dict())
    for way, copied in {**budget.copies(model), "state_dict": swapped(fresh)}.items():
        assert torch.equal(copied(ids, padding), model(ids, padding)), way
        assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]


def test_accelerated_models_travel_by_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="safetensors (the extra `ecosystem`) is not installed"
    )
    model = swapped(perturbed(Model()))
    ids, padding = torch.arange(18).view(3, 6) % 10, budget.padding("holes")
    safetensors.save_model(model, tmp_path / "model.safetensors")
    plain = Model()
    safetensors.load_model(plain, tmp_path / "model.safetensors")
    assert torch.equal(swapped(plain)(ids, padding), model(ids, padding))


# ---------------------------------------------------------------- user-defined adapters


class Pool(nn.Module):
    """A user's pooling of padded sets."""

    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        self.seeds, self.scale = nn.Parameter(torch.randn(2, 1, E)), scale

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        scores = torch.einsum("md,bld->bml", self.seeds[:, 0], x) / E**0.5
        return scores.masked_fill(padding[:, None], -torch.inf).softmax(-1) @ x


class FastPool(Pool):
    """The same pooling, computed by the op."""

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        values, offsets, _ = from_padded(x, padding_mask=padding)
        return ik.pma_pooling(self.seeds, values[:, None], None, offsets)[:, :, 0]


@pytest.fixture
def _no_adapters_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate, "_adapters", dict(accelerate._adapters))


@pytest.mark.usefixtures("_no_adapters_left")
def test_a_registered_class_is_swapped() -> None:
    ik.register_adapter(Pool, lambda pool: "it is scaled" if pool.scale else FastPool)
    before = Pool()
    after = swapped(before)
    assert type(after) is FastPool

    def run(module: Any, inputs: Mapping[str, Any]) -> Tensor:
        return module(inputs["x"], budget.padding("holes"))

    budget.assert_within_budget(before, after, lambda seed: budget.draw(seed, x=(3, 6, E)), run)
    report = ik.accelerate(nn.ModuleList([Pool(), Pool(scale=True)]))
    assert [(entry.name, entry.why) for entry in report.entries[1:]] == [("0", ""), ("1", "it is scaled")]


@pytest.mark.usefixtures("_no_adapters_left")
def test_errors() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, found 3"):
        ik.accelerate(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dry_run must be a bool, found 1"):
        ik.accelerate(Model(), dry_run=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kind must be a subclass of torch.nn.Module, found <class 'int'>"):
        ik.register_adapter(int, lambda _: "")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="adapter must be callable, found 'no'"):
        ik.register_adapter(Pool, "no")  # type: ignore[arg-type]
    ik.register_adapter(Pool, lambda _: nn.Linear)
    with pytest.raises(TypeError, match="the adapter of Pool must return a subclass of Pool, or a string"):
        ik.accelerate(Pool())
