"""Absurd values in files, schemas, plans and settings: each gives one line that names it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interformer import InterFormer, InterFormerConfig, Schema
from interformer.baselines import LogisticRegression
from interformer.checks import short_repr
from interformer.data import (
    MalformedFileError,
    SchemaError,
    SyntheticLaw,
    load_schema,
    read,
    read_beauty,
    read_csv,
    read_movielens,
)
from interformer.data import beauty as beauty_reader
from interformer.data.atomic import read_atomic
from interformer.data.delimited.spec import Dense
from interformer.embedding import module_key
from interformer.experiments.plan import PlanError
from interformer.experiments.plan import read as read_plan
from interformer.schema import Field
from interformer.testing import random_batch
from interformer.train import TrainConfig
from torch import nn

SCHEMA = """
name: x
files: {train: a.csv, valid: a.csv, test: a.csv}
label: y
user: u
dense: [{column: p, transform: none}]
categorical: [i]
sequences: {fields: [{column: h, table: i}], max_length: 7}
"""


def _one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    assert len(str(error)) < 700
    return str(error)


def _csv(directory: Path, cell: str, schema: str = SCHEMA) -> Any:
    (directory / "a.csv").write_text(f"y,u,i,h,p\n1,ann,a,b^c,1.5\n0,ann,a,b^c,{cell}\n")
    (directory / "x.yaml").write_text(schema)
    return read_csv(directory, directory / "x.yaml")


# ---------------------------------------------------------------- numbers outside float32


@pytest.mark.parametrize("cell", ["1e39", "-3.5e38", "1e308", "inf", "nan", "1e999"])
def test_a_cell_that_is_not_finite_in_float32_is_named(tmp_path: Path, cell: str) -> None:
    with pytest.raises(MalformedFileError) as caught:
        _csv(tmp_path, cell)
    assert _one_line(caught.value).startswith(f"{tmp_path / 'a.csv'}:3:5: column 'p' wanted a ")
    assert repr(cell) in str(caught.value)


def test_the_largest_numbers_are_read_and_so_are_larger_ones_by_their_logarithm(tmp_path: Path) -> None:
    for cell in ("3.4028234e38", "-3.4028234e38", "1e-46"):
        assert torch.isfinite(_csv(tmp_path, cell).train.dense).all()
    by_logarithm = SCHEMA.replace("transform: none", "transform: log1p, empty: 1.0e+300")
    for cell in ("1e308", ""):
        assert 600 < float(_csv(tmp_path, cell, by_logarithm).train.dense[1, 0]) < 710
    with pytest.raises(MalformedFileError, match="wanted a finite number, found 'inf'"):
        _csv(tmp_path, "inf", by_logarithm)


def test_an_atomic_table_has_the_same_rule(tmp_path: Path) -> None:
    path = tmp_path / "x.inter"
    for cell in ("1e39", "inf", "nan"):
        path.write_text(f"a:float\tb:float_seq\n1\t2 3\n2\t3 {cell}\n")
        with pytest.raises(MalformedFileError, match=r"x\.inter:3:2: column 'b' wanted a float_seq, found"):
            read_atomic(path, {"a": "float", "b": "float_seq"})


# ---------------------------------------------------------------- MovieLens, Beauty


def _movielens(directory: Path, year: str = "1990", age: str = "30", time_: str = "7", ratings: int = 10) -> Path:
    lines = [f"u\ti{i}\t3\t{i if i else time_}" for i in range(ratings)]
    tables = {
        "inter": ["user_id:token\titem_id:token\trating:float\ttimestamp:float", *lines],
        "item": ["item_id:token\trelease_year:token\tclass:token_seq", *(f"i{i}\t{year}\tDrama" for i in range(10))],
        "user": ["user_id:token\tage:token\tgender:token\toccupation:token", f"u\t{age}\tF\tnone"],
    }
    for suffix, content in tables.items():
        (directory / f"ml.{suffix}").write_text("\n".join(content) + "\n")
    return directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"year": "1" * 5000}, "ml.item:2:2: column 'release_year' wanted a year of at most 4 digits, found '111"),
        ({"year": "12345"}, "ml.item:2:2: column 'release_year' wanted a year of at most 4 digits, found '12345'"),
        ({"age": "9" * 5000}, "ml.user:2:2: column 'age' wanted an age in years, found '999"),
        ({"time_": "1e17"}, "ml.inter:2:4: column 'timestamp' wanted seconds within 9007199254740992, found 1e+17"),
        ({"time_": "-1e300"}, "ml.inter:2:4: column 'timestamp' wanted a float, found '-1e300'"),
    ],
)
def test_movielens_names_cells_out_of_bounds(tmp_path: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(MalformedFileError) as caught:
        read_movielens(_movielens(tmp_path, **change))  # type: ignore[arg-type]
    assert message in _one_line(caught.value)


@pytest.mark.parametrize(("ratings", "part"), [(0, "train"), (1, "valid"), (2, "valid"), (9, "test")])
def test_movielens_wants_rows_in_each_part(tmp_path: Path, ratings: int, part: str) -> None:
    with pytest.raises(ValueError, match=f"wanted rows in each part of 'ml'; {part} has none"):
        read_movielens(_movielens(tmp_path, ratings=ratings))
    assert len(read_movielens(_movielens(tmp_path, ratings=10)).valid) == 1


def test_one_hot_item_costs_no_more_than_others(tmp_path: Path) -> None:
    """Nearly every drawn negative is an item of the user, so most are drawn exactly instead of by rejection."""
    lines = [f"{user} 1 1 1 1 1 {2 + user % 2 if user % 50 == 0 else 1} 1" for user in range(1, 6000)]
    lines += [f"{user} 4 5 4 {4 + user % 2} {4 + user // 2 % 2}" for user in range(6000, 6004)]
    (tmp_path / "Beauty.txt").write_text("\n".join(lines))
    began = time.process_time()
    splits = read_beauty(tmp_path)
    assert time.process_time() - began < 8  # Rejection alone would take minutes.
    for part in splits.parts().values():
        drawn = part.categorical[part.label == 0]
        assert ((drawn[:, 1] == 0) <= (drawn[:, 0] >= 5999)).all()  # Item 1 is drawn only for users without it.


def test_draws_among_others_are_in_proportion_to_the_counts() -> None:
    """With every ticket once, each item is drawn as often as its count, and the user's own items never."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        users, items = rng.integers(1, 5), rng.integers(2, 9)
        one_each = np.arange(users) * items + rng.integers(items, size=users)
        owned = np.unique(np.concatenate([one_each, rng.integers(users * items, size=rng.integers(0, 10))]))
        count = rng.integers(0, 4, size=items)
        for user in range(users):
            remaining = count.copy()
            remaining[owned[owned // items == user] % items] = 0
            if not remaining.sum():
                continue

            class Tickets:
                def integers(self, high: Any) -> Any:
                    assert (high == remaining.sum()).all()  # noqa: B023
                    return np.arange(remaining.sum())  # noqa: B023

            repeated_user = np.full(remaining.sum(), user)
            result = beauty_reader._draw_exactly(owned, repeated_user, np.cumsum(count), count, Tickets())  # type: ignore[arg-type]
            assert np.bincount(result, minlength=items).tolist() == remaining.tolist()


# ---------------------------------------------------------------- schemas, plans


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("transform: none", "empty: .inf", "wanted dense 'p': empty to be finite in float32; found inf"),
        ("transform: none", "empty: .nan", "wanted dense 'p': empty to be finite in float32; found nan"),
        ("transform: none", "empty: 1.0e+39", "wanted dense 'p': empty to be finite in float32; found 1e+39"),
        ("transform: none", f"empty: 1{'0' * 400}", "empty: wanted a number that is finite; found 1000"),
        ("max_length: 7", f"max_length: {2**63}", f"sequences.max_length to be at most 2147483647; found {2**63}"),
        ("label: y", f"min_count: {2**70}\nlabel: y", "wanted min_count to be at most 2147483647"),
        (
            "valid: a.csv, test: a.csv}",
            "test: a.csv}\nsplit: {by: rows, valid: 0.1, seed: -1}",
            "split.seed to be 0 to",
        ),
        ("valid: a.csv, test: a.csv}", "test: a.csv}\nsplit: {by: rows, valid: .nan}", "split.valid to be above 0"),
        ("name: x", "name: a/b", "wanted letters, digits and . _ - for its name; found 'a/b'"),
        ("name: x", "name: ../x", "wanted letters, digits and . _ - for its name; found '../x'"),
        ("name: x", "name: ..", "wanted a name without a dot in front for its name; found '..'"),
        ("name: x", f"name: {'x' * 300}", "wanted a name of at most 100 bytes for its name; found 'xxx"),
        ("name: x", "name: ''", "wanted letters, digits and . _ - for its name; found ''"),
        ("label: y", "separator: '\"'\nlabel: y", "wanted separator to be neither a quote nor a line end"),
        ("label: y", f"label: {'[' * 3000}{']' * 3000}", "wanted YAML; found nested too deeply"),
        ("label: y", "label: !!timestamp x", "wanted YAML; found"),
        ("label: y", "label: 2001-99-99", "wanted YAML; found month must be in 1..12"),
        ("label: y", "label: !!int x", "wanted YAML; found"),
        ("label: y", "label: !!python/object/apply:os.getpid []", "wanted YAML; found line 4, column 8"),
        ("label: y", f"label: {'9' * 5000}", "wanted YAML; found"),
        ("label: y", "? [a, b]\n: y", "wanted YAML; found"),
        ("label: y", "label: &a [*a]", "x.yaml.label: wanted a string; found"),
        ("label: y", f"label: {list(range(9999))}", "x.yaml.label: wanted a string; found [0, 1, 2"),
        ("label: y", "label: \0", "wanted YAML; found"),
    ],
)
def test_schemas_name_what_cannot_be(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SCHEMA
    (tmp_path / "x.yaml").write_text(SCHEMA.replace(old, new))
    with pytest.raises(SchemaError) as caught:
        load_schema(tmp_path / "x.yaml")
    assert message in _one_line(caught.value)


def test_many_aliases_do_not_make_a_long_message(tmp_path: Path) -> None:
    bomb = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" if n else "a0: &a0 [x]" for n in range(30))
    (tmp_path / "x.yaml").write_text(bomb)
    with pytest.raises(SchemaError) as caught:
        load_schema(tmp_path / "x.yaml")
    _one_line(caught.value)
    (tmp_path / "x.yaml").write_text(bomb + "\nname: *a29")
    with pytest.raises(PlanError) as caught_too:
        read_plan(tmp_path / "x.yaml")
    _one_line(caught_too.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training: {lr: .inf}", "training.lr: wanted a number that is finite in float32; found inf"),
        ("training: {lr: 1e39}", "training.lr: wanted a number that is finite in float32; found 1e+39"),
        (f"training: {{lr: 1{'0' * 400}}}", "training.lr: wanted a number that is finite in float32; found 1000"),
        (f"training: {{epochs: {2**63}}}", "epochs must be 1 to 2147483647, found 9223372036854775808"),
        ("model: {dropout: .nan}", "model.dropout: wanted a number that is finite in float32; found nan"),
        (f"model: {{head_hidden: [{2**40}]}}", "head_hidden[0] must be 1 to 2147483647"),
        ("group: a/b", "v.group: wanted letters, digits and . _ -; found 'a/b'"),
        ("group: .hidden", "v.group: wanted a name without a dot in front; found '.hidden'"),
        (f"group: {'[' * 3000}{']' * 3000}", "nested too deeply"),
        ("? [a, b]\n    : 1", "x.yaml: "),
    ],
)
def test_plans_name_what_cannot_be(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"name: x\ndata: {{reader: synthetic}}\nseeds: [1]\nvariants:\n  v:\n    {change}\n")
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert message in _one_line(caught.value)


@pytest.mark.parametrize("seeds", ["[-1]", f"[{2**63}]"])
@pytest.mark.parametrize("name", ["x", ".."])
def test_plans_name_seeds_and_folders_that_cannot_be(tmp_path: Path, seeds: str, name: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"name: {name}\ndata: {{reader: synthetic}}\nseeds: {seeds}\nvariants: {{v: {{}}}}\n")
    expected = "seeds: wanted seeds of 0 to 4294967295" if name == "x" else "name: wanted a name without a dot in front"
    with pytest.raises(PlanError, match=expected):
        read_plan(path)


@pytest.mark.parametrize(
    ("reader", "options", "error", "message"),
    [
        ("synthetic", {"num_users": "many"}, TypeError, "num_users must be an int, found 'many'"),
        ("synthetic", {"num_users": 1.5}, TypeError, "num_users must be an int, found 1.5"),
        ("synthetic", {"seed": -1}, ValueError, "seed must be 0 to 4294967295, found -1"),
        ("synthetic", {"mean_length": float("inf")}, ValueError, "mean_length must be at most 1e+09, found inf"),
        ("synthetic", {"max_history": 2**63}, ValueError, "max_history must be 1 to 2147483647"),
        ("beauty", {"seed": -1}, ValueError, "seed must be 0 to 4294967295, found -1"),
        ("beauty", {"negatives": "2"}, TypeError, "negatives must be an int, found '2'"),
        ("beauty", {"max_history": 2**63}, ValueError, "wanted max_history >= 1 and negatives >= 1"),
        ("movielens", {"valid": "0.1"}, TypeError, "valid must be a number, found '0.1'"),
        ("movielens", {"valid": float("nan")}, ValueError, "wanted max_history >= 1, valid > 0"),
        ("movielens", {"max_history": 2**63}, ValueError, "wanted max_history >= 1"),
        ("csv", {"schema": 5}, ValueError, "wanted a schema, or a string that names one; found 5"),
        ("csv", {"schema": "x", "progress": 5}, ValueError, "options must be among schema, max_history, cache"),
    ],
)
def test_readers_name_options_that_cannot_be(
    tmp_path: Path, reader: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = None if reader == "synthetic" else _movielens(tmp_path)
    with pytest.raises(error) as caught:
        read(reader, path, **options)
    assert message in _one_line(caught.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e39, 10**400])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "embedding_weight_decay", "lr_decay"])
def test_training_settings_are_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must ") as caught:
        TrainConfig(**{name: value})
    _one_line(caught.value)


def test_kinds_of_settings_are_checked() -> None:
    with pytest.raises(TypeError, match="epochs must be an int, found 1.5"):
        TrainConfig(epochs=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="lr must be a number, found '1'"):
        TrainConfig(lr="1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rope_base must lie in \[1, inf\), found inf"):
        InterFormerConfig(rope_base=float("inf"))
    with pytest.raises(ValueError, match="SyntheticLaw: mean_length must be above 0, found nan"):
        SyntheticLaw(mean_length=float("nan"))
    assert Dense("x", empty=0.0).empty == 0
    assert len(short_repr(10**10_000)) < 200


# ---------------------------------------------------------------- names of fields


HARD = ["type", "train", "forward", "", ".", "a.b", "weight", "training", "keys", "_modules", "é", "100%", "%", "type%"]


def _schema(names: list[str]) -> Schema:
    tables = dict.fromkeys(names, 5)
    fields = tuple(Field(name, name) for name in names)
    return Schema(tables, (), fields, fields[:2], candidate=(names[0],))


@pytest.mark.parametrize("names", [HARD, [name for name in dir(nn.ModuleDict()) if not name.startswith("__")]])
def test_fields_may_have_any_name(names: list[str]) -> None:
    assert len({module_key(name) for name in names}) == len(names)
    schema = _schema(names)
    config = InterFormerConfig(embed_dim=8, num_heads=2, num_layers=1, head_hidden=(4,), interaction_hidden=(4,))
    for model in (InterFormer(config, schema), LogisticRegression(config, schema)):
        batch = random_batch(schema, lengths=(3, 0, 2))
        model(batch).sum().backward()
        state = model.state_dict()
        restored = type(model)(config, schema)
        restored.load_state_dict(state)
        assert torch.equal(restored.eval()(batch), model.eval()(batch))


def test_ordinary_names_are_the_keys_they_were() -> None:
    config = InterFormerConfig(embed_dim=8, num_heads=2, num_layers=1, head_hidden=(4,), interaction_hidden=(4,))
    assert "embedding.tables.item_id.weight" in InterFormer(config, _schema(["item_id", "user id"])).state_dict()
