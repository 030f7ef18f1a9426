"""Plans read from an experiment's YAML, their error messages, and the shipped files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interformer import InterFormerConfig
from interformer.experiments.plan import BOOSTING, PlanError, find, read, trials
from interformer.models import build_model
from interformer.schema import Field
from interformer.testing import random_batch, small_schema
from interformer.train import TrainConfig

PLAN = """
name: trial
data: {reader: synthetic, num_users: 60}
seeds: [1, 2, 3]
base:
  model: {embed_dim: 8, num_heads: 2, head_hidden: [16, 8]}
  training: {lr: 4e-3, epochs: 3}
  search: {training.lr: [1e-3, 1e-2]}
variants:
  interformer: {}
  floor: {kind: logistic_regression, group: baselines, training: {lr: 1}, seeds: [2]}
  no_pma: {group: pieces, model: {num_seeds: 0}, search: {model.dropout: [0, 0.5]}}
"""
SHIPPED = ("amazon_electronics", "beauty", "completejourney", "kuaivideo", "movielens", "taobao_ad")


def _write(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


def test_a_variants_fields_go_before_those_of_the_base(tmp_path: Path) -> None:
    plan = read(_write(tmp_path, PLAN))
    assert (plan.name, plan.reference) == ("trial", "interformer")
    assert plan.data == {"reader": "synthetic", "num_users": 60}
    whole, floor, no_pma = plan.variants
    model = InterFormerConfig(embed_dim=8, num_heads=2, head_hidden=(16, 8))
    training = TrainConfig(lr=0.004, epochs=3)
    assert (whole.kind, whole.group, whole.model, whole.training) == ("interformer", None, model, training)
    assert (floor.kind, floor.group, floor.training) == ("logistic_regression", "baselines", replace(training, lr=1.0))
    assert isinstance(floor.training.lr, float)
    assert no_pma.model == replace(model, num_seeds=0)
    assert [variant.seeds for variant in plan.variants] == [(1, 2, 3), (2,), (1, 2, 3)]


def test_names_and_seeds_choose(tmp_path: Path) -> None:
    plan = read(_write(tmp_path, PLAN))
    chosen = plan.choose(("floor", "no_pma"), (1, 3))
    assert [(variant.name, variant.seeds) for variant in chosen] == [("floor", ()), ("no_pma", (1, 3))]
    assert plan.choose((), ()) == plan.variants


def test_the_grid_of_a_search_is_all_of_its_points(tmp_path: Path) -> None:
    plan = read(_write(tmp_path, PLAN))
    whole, _, no_pma = plan.variants
    assert [variant.training.lr for _, variant in trials(whole)] == [0.001, 0.01]
    tried = list(trials(no_pma))
    assert [(variant.training.lr, variant.model.dropout) for _, variant in tried] == [
        (0.001, 0.0),
        (0.001, 0.5),
        (0.01, 0.0),
        (0.01, 0.5),
    ]
    assert tried[1][0] == {"training.lr": 0.001, "model.dropout": 0.5}
    assert {variant.model.num_seeds for _, variant in tried} == {0}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: trial", "name: [trial", "line 3, column 5: expected ',' or ']', but got ':'"),
        (PLAN, "- 1", "wanted a mapping with name, data, seeds and variants, found [1]"),
        ("name: trial", "name: ../trial", "name: wanted letters, digits and . _ -; found '../trial'"),
        ("name: trial", "", "name: wanted a name; found None"),
        ("name: trial", "name: trial\nspeed: 1", "speed: the key must be one of base, data, name"),
        ("seeds: [1, 2, 3]", "seeds: [1, 1]", "seeds: wanted different whole numbers, at least one; found [1, 1]"),
        ("seeds: [1, 2, 3]", "seeds: 3", "seeds: wanted different whole numbers, at least one; found 3"),
        ("seeds: [2]", "seeds: [4]", "variants.floor.seeds: wanted some of 1, 2, 3; found [4]"),
        ("reader: synthetic, ", "", "data.reader: wanted the name of a reader; found None"),
        ("embed_dim: 8", "embed: 8", "base.model.embed: the key must be one of attention, backbone"),
        ("num_seeds: 0", "num_seed: 0", "variants.no_pma.model.num_seed: the key must be one of attention"),
        ("num_seeds: 0", "num_seeds: -1", "variants.no_pma.model: num_seeds must be at least 0, found -1"),
        ("num_seeds: 0", "num_seeds: two", "variants.no_pma.model.num_seeds: wanted a value of kind int; found 'two'"),
        ("num_seeds: 0", "num_seeds: true", "variants.no_pma.model.num_seeds: wanted a value of kind int; found True"),
        ("lr: 4e-3", "lr: fast", "base.training.lr: wanted a value of kind float; found 'fast'"),
        ("epochs: 3", "seed: 3", "base.training.seed: the key must be one of batch_size"),
        ("kind: logistic_regression", "kind: dien", "variants.floor.kind: wanted boosting or a model: model must"),
        (
            "kind: logistic_regression",
            "kind: nowhere:Model",
            "variants.floor.kind: wanted boosting or a model: No module",
        ),
        ("group: pieces", "groups: pieces", "variants.no_pma.groups: the key must be one of group, kind"),
        ("no_pma:", "floor:", "line 12, column 3: found 'floor' a second time"),
        ("no_pma:", "no/pma:", "variants.no/pma: wanted a name of letters, digits, . and _; found 'no/pma'"),
        ("training.lr: [", "lr: [", "base.search.lr: wanted model.FIELD or training.FIELD; found 'lr'"),
        ("model.dropout: [0, 0.5]", "model.dropout: 0.5", "search.model.dropout: wanted a list of values; found 0.5"),
        (
            "model.dropout: [0, 0.5]",
            "model.dropout: [2]",
            "variants.no_pma.search: dropout must lie in [0, 1), found 2.0",
        ),
        (
            "seeds: [1",
            "reference: best\nseeds: [1",
            "reference: wanted one of interformer, floor, no_pma; found 'best'",
        ),
    ],
)
def test_mistakes_are_told_by_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in PLAN
    path = _write(tmp_path, PLAN.replace(old, new, 1))
    with pytest.raises(PlanError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_file_or_the_name_of_a_shipped_one() -> None:
    assert find("movielens") == find("movielens.yaml")
    with pytest.raises(FileNotFoundError, match="no_such: wanted a file or one of .*movielens.yaml.*; found neither"):
        find("no_such")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_variant_that_is_shipped_can_be_trained(name: str) -> None:
    plan = read(find(name))
    assert plan.name == name
    small = {"embed_dim": 8, "num_heads": 2, "num_layers": 1, "interaction_hidden": (8,), "head_hidden": (8,)}
    for variant in plan.variants:
        if variant.kind == BOOSTING:  # not a module
            continue
        schema = small_schema()
        if variant.model.event_fields:
            schema = replace(schema, sequences=tuple(Field(name, "item") for name in variant.model.event_fields))
        model = build_model(variant.kind, replace(variant.model, **small), schema)
        model(random_batch(schema, [0, 3, 12])).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None), variant.name


def test_the_papers_settings_are_the_published_ones() -> None:
    for name, width, length in (("amazon_electronics", 64, 100), ("taobao_ad", 32, 50), ("kuaivideo", 64, 100)):
        (whole, *_) = read(find(name)).variants
        model, training = whole.model, whole.training
        assert (model.embed_dim, model.max_history) == (width, length)
        assert (model.num_cls, model.num_seeds, model.num_recent) == (4, 2, 2)
        assert (training.batch_size, training.weight_decay, training.embedding_weight_decay) == (2048, 0.0, 0.0)
        assert whole.search == {"model.num_heads": (1, 2, 4, 8)}
        assert [variant.model.num_heads for _, variant in trials(whole)] == [1, 2, 4, 8]
