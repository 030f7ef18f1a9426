"""The model: every form runs and learns all parameters, rows are independent, identities hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from every import EVERY
from interformer import InterFormer, InterFormerConfig, Schema, cross
from interformer.batch import Layout
from interformer.cross import SelectiveSummary
from interformer.layers import Gating, MaskNet, RotaryTables
from interformer.testing import random_batch, rows_of, small_schema
from module_budget import assert_within_budget, perturbed
from small_model import SMALL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interformer_kernels.ops.pma_folded import pool_folded

LENGTHS = (3, 0, 17, 1, 2, 40)
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "dot": {"backbone": "dot"},
    "dcnv2": {"backbone": "dcnv2", "backbone_layers": 3},
    "dhen-1": {"backbone_layers": 1},
    "dhen-3": {"backbone_layers": 3},
    "rank": {"pffn": "rank"},
    "literal": {"literal": True},
    "literal-rank": {"literal": True, "pffn": "rank"},
    "self_identity": {"gate": "self_identity"},
    "self_sigmoid": {"gate": "self_sigmoid"},
    "multiply_sigmoid": {"gate": "multiply_sigmoid"},
    "mask-sigmoid": {"mask_output": "sigmoid"},
    "no-pma": {"num_seeds": 0},
    "no-recent": {"num_recent": 0},
    "one-layer": {"num_layers": 1},
    "one-head": {"num_heads": 1, "num_cls": 1, "num_seeds": 3, "num_recent": 5},
    "dropout": {"dropout": 0.3, "embedding_dropout": 0.2},
    "two_layer": {"pffn": "two_layer", "pffn_inner": 7},
    "gdpa": {"pffn": "gdpa", "pffn_inner": 7, "pffn_tau": 2.0},
    "literal-gdpa": {"literal": True, "pffn": "gdpa", "pffn_inner": 7},
    "no-gate": {"gate": "none"},
    "no-cls": {"cls": False},
    "no-pffn": {"pffn": "none"},
    "no-mha": {"attention": False},
    "neither-half": {"pffn": "none", "attention": False},
    "no-mask": {"mask_output": "none"},
    "two-fields": {"event_fields": ("opinion", "item")},
    "mab": {"pma": "mab"},
    "folded": {"num_seeds": 1},
    "folded-mab": {"num_seeds": 1, "pma": "mab"},
    "hierarchical": {"pool_seeds": 5, "pool_products": 3},
    "window": {"window": (2, 1)},
    "mean": {"summary": "mean"},
    "mlp": {"summary": "mlp"},
    "mha": {"summary": "mha"},
    "n2s": {"flow": "n2s"},
    "s2n": {"flow": "s2n"},
    "sep": {"flow": "sep"},
    "sep-rank": {"flow": "sep", "pffn": "rank"},
    "sole": {"flow": "sole"},
    "sole-literal": {"flow": "sole", "literal": True, "backbone": "dot"},
}


def _model(config: InterFormerConfig, schema: Schema | None = None, seed: int = 0) -> InterFormer:
    torch.manual_seed(seed)
    return InterFormer(config, schema or small_schema())


@pytest.mark.parametrize(
    "lengths", [LENGTHS, (5,), (0,), (0, 0)], ids=["mixed", "one row", "one empty row", "all empty"]
)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_runs_and_all_parameters_learn(form: str, lengths: tuple[int, ...]) -> None:
    model = _model(replace(SMALL, **FORMS[form]))
    batch = random_batch(model.schema, lengths)
    logits = model(batch)
    assert logits.shape == (len(lengths),)
    assert logits.isfinite().all()
    torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.label).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if lengths is LENGTHS:
            assert parameter.grad.any(), f"{name} does not reach the loss"


@pytest.mark.parametrize("form", ["default", "rank", "dcnv2", "literal", "two_layer", "gdpa", "window", "mha", "sep"])
def test_a_row_does_not_depend_on_its_neighbours(form: str) -> None:
    model = _model(replace(SMALL, **FORMS[form])).double()
    batch = random_batch(model.schema, LENGTHS)
    together = model(batch)
    for row in range(len(LENGTHS)):
        alone = model(rows_of(batch, [row]))
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-10, atol=1e-12)
    order = [5, 1, 3, 0, 2, 4]
    torch.testing.assert_close(model(rows_of(batch, order)), together[order], rtol=1e-10, atol=1e-12)


def test_tail_events_of_no_row_change_nothing() -> None:
    model = _model(SMALL)
    with_tail = random_batch(model.schema, LENGTHS, tail=7)
    without = replace(with_tail, sequences=with_tail.sequences[:-7])
    torch.testing.assert_close(model(with_tail), model(without))


class _OneDevice(TorchDispatchMode):
    """Refuses operations between devices, and so every read by the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
        assert len(devices) <= 1, f"{function} works on {devices}"
        return result


@pytest.mark.parametrize("form", FORMS)
def test_no_step_reads_or_moves_contents(form: str) -> None:
    """On `meta`, which has none, a training step finds all that it needs; a captured CUDA graph rests on that."""
    model = _model(replace(SMALL, **FORMS[form])).to("meta")
    batch = random_batch(model.schema, LENGTHS, tail=7).to("meta")
    with _OneDevice():
        F.binary_cross_entropy_with_logits(model(batch), batch.label).backward()
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in model.parameters())


def test_no_rows_give_no_logits() -> None:
    model = _model(SMALL)
    assert model(random_batch(model.schema, ())).shape == (0,)
    assert model(random_batch(model.schema, (), tail=3)).shape == (0,)


def test_a_schema_without_dense_scalars_has_one_token_less() -> None:
    schema = small_schema(num_dense=0)
    model = _model(SMALL, schema)
    assert schema.num_tokens == 3
    assert model(random_batch(schema, LENGTHS)).isfinite().all()


def test_order_of_the_history_matters() -> None:
    model = _model(SMALL)
    batch = random_batch(model.schema, (9,))
    reversed_row = replace(batch, sequences=torch.cat((batch.sequences[:7].flip(0), batch.sequences[7:])))
    assert not torch.allclose(model(batch), model(reversed_row), rtol=1e-4)


def _logits_and_loss(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    batch = random_batch(model.schema, 4 * LENGTHS, seed=inputs["seed"])
    logits = model(batch)
    loss = F.binary_cross_entropy_with_logits(logits, batch.label.to(logits.dtype))
    return torch.cat((logits, loss[None]))


# CI runs every second case: each takes some seconds.
COMPARED = sorted(FORMS.keys() - {"dropout"})[:: 1 if EVERY else 2]


@pytest.mark.parametrize("form", COMPARED)
def test_the_kernels_give_the_references_numbers(form: str) -> None:
    """Logits, loss and every parameter's gradient stay within the budget of the ops, with one state for both."""
    reference = perturbed(_model(replace(SMALL, backend="reference", **FORMS[form])), by=0.1)
    fastest = _model(replace(SMALL, **FORMS[form]), seed=1)
    assert list(reference.state_dict()) == list(fastest.state_dict())
    fastest.load_state_dict(reference.state_dict())
    assert_within_budget(reference, fastest, lambda seed: {"seed": seed}, _logits_and_loss, max_draws=32)


def test_pma_folds_its_projections_where_that_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = []
    monkeypatch.setattr(cross, "pool_folded", lambda *args, **kwargs: folded.append(1) or pool_folded(*args, **kwargs))
    batch = random_batch(small_schema(), LENGTHS)
    for backend, num_seeds, expected in ((None, 1, True), (None, 2, False), ("reference", 1, False)):
        folded.clear()
        _model(replace(SMALL, num_seeds=num_seeds, backend=backend))(batch)
        assert bool(folded) is expected


def test_literal_form_ends_with_the_last_layers_cross_arch() -> None:
    default, literal = _model(SMALL), _model(replace(SMALL, literal=True))
    assert (len(default.cross), len(default.sequence), len(default.interaction)) == (3, 2, 2)
    assert (len(literal.cross), len(literal.sequence), len(literal.interaction)) == (2, 1, 1)
    assert not any("norm" in name for name, _ in literal.sequence.named_parameters())


def test_literal_sequence_arch_is_attention_of_the_feed_forward_alone() -> None:
    model = _model(replace(SMALL, literal=True))
    arch = model.sequence[0]
    layout = Layout.from_offsets(torch.tensor([0, 3, 3]), 3, SMALL.num_cls, SMALL.num_recent)
    tokens, x_sum = torch.randn(3 + 2 * SMALL.num_cls, 8), torch.randn(2, SMALL.num_cls, 8)
    fed = arch.feed_forward(tokens, x_sum, layout.offsets)
    expected = arch.attention(fed, layout.offsets, model.rope())
    torch.testing.assert_close(arch(tokens, x_sum, layout.offsets, model.rope()), expected)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("self_identity", lambda z, g: z * g),
        ("self_tanh", lambda z, g: torch.tanh(z * g)),
        ("self_sigmoid", lambda z, g: torch.sigmoid(z * g)),
        ("multiply_sigmoid", lambda z, g: z * torch.sigmoid(g)),
    ],
)
def test_gates_are_equation_10(mode: str, expected: Any) -> None:
    gate, z = Gating(replace(SMALL, gate=mode)), torch.randn(2, 3, 8)
    torch.testing.assert_close(gate(z), expected(z, gate.g(z)))


def test_mask_net_is_equation_6() -> None:
    net, events = MaskNet(replace(SMALL, mask_output="sigmoid"), 3), torch.randn(5, 24)
    torch.testing.assert_close(net(events), net.lce(events * torch.sigmoid(net.mask(events))))


def test_layout_puts_cls_in_front_and_finds_the_last_events() -> None:
    layout = Layout.from_offsets(
        torch.tensor([0, 3, 3, 4]), 6, num_cls=2, num_recent=2
    )  # rows of 3, 0 and 1, a tail of 2
    behaviours = torch.arange(1.0, 7)[:, None]
    cls_tokens = torch.tensor([[-1.0, -2], [-3, -4], [-5, -6]])[..., None]
    tokens = layout.prepend(cls_tokens, behaviours)
    assert tokens.flatten().tolist() == [-1, -2, 1, 2, 3, -3, -4, -5, -6, 4, 5, 6]
    assert layout.offsets.tolist() == [0, 5, 7, 10]
    assert layout.take_cls(tokens).flatten().tolist() == [-1, -2, -3, -4, -5, -6]
    assert layout.take_summary(tokens).squeeze(-1).tolist() == [[-1, -2, 2, 3], [-3, -4, 0, 0], [-5, -6, 0, 4]]


@pytest.mark.parametrize("gate", ["self_tanh", "self_sigmoid", "multiply_sigmoid"])
def test_missing_recent_events_are_zero_after_the_gate(gate: str) -> None:
    config = replace(SMALL, gate=gate)
    layout = Layout.from_offsets(torch.tensor([0, 1, 1]), 1, config.num_cls, config.num_recent)
    summary = SelectiveSummary(config)(torch.randn(1 + 2 * config.num_cls, 8), layout)
    assert summary.shape == (2, config.num_cls + config.num_seeds + config.num_recent, 8)
    recent = summary[:, -config.num_recent :]
    assert recent[0, 1].all()
    assert not recent[0, 0].any()
    assert not recent[1].any()


def test_rotary_tables_stay_float32_and_exact() -> None:
    tables = RotaryTables(1000, 8, 10000.0)
    cos, sin = (table.clone() for table in tables())
    for dtype in (torch.bfloat16, torch.float64):
        assert all(table.dtype == torch.float32 for table in tables.to(dtype)())
        torch.testing.assert_close(tables()[0], cos, rtol=0, atol=0)
        torch.testing.assert_close(tables()[1], sin, rtol=0, atol=0)
    assert not tables.state_dict()


def test_a_history_longer_than_the_tables_is_refused() -> None:
    model = _model(replace(SMALL, max_history=4))
    with pytest.raises(ValueError, match="at most P = 8 tokens, found 9"):
        model(random_batch(model.schema, (5,)))


@pytest.mark.parametrize("side", ["categorical", "sequences"])
def test_a_batch_of_another_schema_is_named(side: str) -> None:
    model = _model(SMALL)
    batch = random_batch(model.schema, LENGTHS)
    narrow_batch = replace(batch, **{side: getattr(batch, side)[:, 1:]})
    with pytest.raises(ValueError, match=rf"batch\.{side} must have one column for each of .*; found shape \[\d+, 2\]"):
        model(narrow_batch)


def test_bfloat16_autocast_trains() -> None:
    model = _model(SMALL)
    batch = random_batch(model.schema, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(batch).float(), batch.label)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
