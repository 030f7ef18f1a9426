"""Fields of requests, candidates and events, and the counts that a production system has."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from interformer.data.completejourney.requests import Requests
from interformer.data.completejourney.tables import (
    DAY,
    DEMOGRAPHICS,
    HOUR,
    WEEK,
    WEEKS,
    Floats,
    Ints,
    Tables,
    Transactions,
)

PRICES, GAPS, COUNTS, LIFTS = 16, 12, 16, 16  # numbers of buckets


class Fields(NamedTuple):
    """Columns of ids, by name, each with the table that it reads and that table's size."""

    columns: dict[str, Ints]
    tables: dict[str, str]
    sizes: dict[str, int]

    def add(self, name: str, ids: Ints, table: str, size: int) -> None:
        self.columns[name], self.tables[name], self.sizes[table] = ids, table, size


def products_seen(tables: Tables, last_week: int, purchases: int = 5) -> Ints:
    """The id of each product for models: those bought so often up to a week are numbered from 1, others are 0."""
    bought = np.bincount(tables.lines.product[tables.lines.week <= last_week], minlength=len(tables.products.id))
    bought[0] = 0
    seen = bought >= purchases
    return np.where(seen, np.cumsum(seen), 0)


def price_bucket(price: Floats) -> Ints:
    """Half octaves from 1/8 on, 1 to 15; 0 is an unknown price."""
    known = price > 0
    octaves = np.log2(np.where(known, price, 1))
    return np.where(known, np.clip(np.floor(2 * octaves) + 7, 1, PRICES - 1), 0).astype(np.int64)


def usual_price(tables: Tables, last_week: int) -> Floats:
    """The median price of each product up to a week, 0 where unknown."""
    lines = tables.lines
    some = np.flatnonzero((lines.week <= last_week) & (lines.price > 0))
    some = some[np.lexsort((lines.price[some], lines.product[some]))]
    first = np.flatnonzero(np.diff(lines.product[some], prepend=-1))
    counts = np.diff(np.r_[first, len(some)])
    median = np.zeros(len(tables.products.id))
    low, high = some[first + (counts - 1) // 2], some[first + counts // 2]
    median[lines.product[some[first]]] = (lines.price[low] + lines.price[high]) / 2
    return median


def _log_bucket(x: Ints | Floats, most: int) -> Ints:
    """0 for 0, then 1 + the whole part of twice the logarithm to base 2."""
    return np.where(x > 0, np.minimum(1 + np.floor(2 * np.log2(np.maximum(x, 1))), most), 0).astype(np.int64)


def gap_bucket(days: Floats, most: int = GAPS - 1) -> Ints:
    """Days since something, 1 to `most` by whole octaves; negative ones are never, 0."""
    return np.where(days < 0, 0, np.minimum(1 + np.floor(np.log2(np.maximum(days, 0) + 1)), most)).astype(np.int64)


def event_fields(tables: Tables, seen: Ints) -> Fields:
    """Product, type, category, price, and the days since the household's visit before."""
    lines, products = tables.lines, tables.products
    fields = Fields({}, {}, {})
    fields.add("product", seen[lines.product], "product", int(seen.max()) + 1)
    fields.add("type", products.type[lines.product], "type", products.sizes["type"])
    fields.add("category", products.category[lines.product], "category", products.sizes["category"])
    fields.add("price", price_bucket(lines.price), "price", PRICES)
    fields.add("gap", gap_bucket(days_since_visit(lines)), "gap", GAPS)
    return fields


def days_since_visit(lines: Transactions) -> Floats:
    """From the household's visit before to that of each line; -1 for its first one."""
    visit = np.flatnonzero((np.diff(lines.household, prepend=-1) != 0) | (np.diff(lines.time, prepend=-1) != 0))
    household, time = lines.household[visit], lines.time[visit]
    days = np.diff(time, prepend=0) / DAY
    days[np.diff(household, prepend=-1) != 0] = -1
    return np.repeat(days, np.diff(np.r_[visit, len(lines.time)]))


def request_fields(tables: Tables, requests: Requests) -> Fields:
    """Household, store, week, hour, weekday and demographics, of each request."""
    lines, at = tables.lines, requests.line
    local = lines.local[at]
    fields = Fields({}, {}, {})
    fields.add("household", lines.household[at], "household", tables.sizes["household"])
    fields.add("store", lines.store[at], "store", tables.sizes["store"])
    fields.add("week", local // WEEK + 1, "week", WEEKS + 1)
    fields.add("hour", local % DAY // HOUR, "hour", 24)
    fields.add("weekday", local % WEEK // DAY, "weekday", 7)
    for column, name in enumerate(DEMOGRAPHICS):
        fields.add(name, tables.demographics[lines.household[at], column], name, tables.sizes[name])
    return fields


def candidate_fields(tables: Tables, requests: Requests, seen: Ints, price: Floats) -> Fields:
    """Product, type, category, department, brand, usual price, display and mailer, of each candidate."""
    products, promotions, product = tables.products, tables.promotions, requests.product
    fields = Fields({}, {}, {})
    fields.add("product", seen[product], "product", int(seen.max()) + 1)
    for name in ("type", "category", "department", "brand"):
        fields.add(name, getattr(products, name)[product], name, products.sizes[name])
    fields.add("price", price_bucket(price[product]), "price", PRICES)
    fields.add("display", promotions.display[requests.promotion], "display", 37)
    fields.add("mailer", promotions.mailer[requests.promotion], "mailer", 37)
    return fields


class History:
    """Purchases of households by kind, to be counted before a time; `kind` numbers that of each line."""

    def __init__(self, lines: Transactions, kind: Ints) -> None:
        self.kinds = int(kind.max(initial=0)) + 1
        keys = lines.household * self.kinds + kind
        order = np.lexsort((lines.time, keys))
        self.keys, self.times = keys[order], lines.time[order]
        self.span = int(lines.time.max(initial=0)) + 2
        self.places = np.unique(self.keys)
        self.combined = np.searchsorted(self.places, self.keys) * self.span + self.times

    def before(self, household: Ints, kind: Ints, time: Ints) -> tuple[Ints, Floats]:
        """How many lines, and the days since the last of them; -1 without one."""
        key = household * self.kinds + kind
        place = np.searchsorted(self.places, key)
        known = self.places[place.clip(max=len(self.places) - 1)] == key
        end = np.searchsorted(self.combined, place * self.span + time)
        start = np.searchsorted(self.combined, place * self.span)
        times = np.where(known, end - start, 0)
        last = self.times[(end - 1).clip(min=0)]
        return times, np.where(times > 0, (time - last) / DAY, -1.0)


def count_fields(tables: Tables, requests: Requests, last_week: int) -> Fields:
    """Times bought and days since, of the product and its type; times of the category; lifts of type and category.

    A lift is the share of a kind in the household's history over its share in all lines up to a week. All are of lines
    strictly before the request. Numbers are buckets of half octaves.
    """
    lines, products = tables.lines, tables.products
    at = requests.line[requests.request]
    household, time = lines.household[at], lines.time[at]
    length = history_spans(lines, requests.line)[1][requests.request]
    early = lines.product[lines.week <= last_week]
    fields = Fields({}, {}, {})
    for name, kind in (
        ("product", np.arange(len(products.id))),
        ("type", products.type),
        ("category", products.category),
    ):
        times, days = History(lines, kind[lines.product]).before(household, kind[requests.product], time)
        fields.add(f"{name}_times", _log_bucket(times, COUNTS - 1), f"{name}_times", COUNTS)
        if name != "category":
            fields.add(f"{name}_days", gap_bucket(days), f"{name}_days", GAPS)
        if name != "product":
            share = np.bincount(kind[early], minlength=int(kind.max()) + 1) / max(len(early), 1)
            expected = share[kind[requests.product]] * length
            lift = np.divide(times, expected, out=np.zeros(len(times)), where=expected > 0)
            bucket = np.clip(np.floor(2 * np.log2(np.maximum(lift, 2.0**-9))) + 7, 1, LIFTS - 1)
            fields.add(f"{name}_lift", np.where(lift > 0, bucket, 0).astype(np.int64), f"{name}_lift", LIFTS)
    return fields


def history_spans(lines: Transactions, at: Ints) -> tuple[Ints, Ints]:
    """The first line of the household, and how many are strictly before the visit of line `at`."""
    household, time = lines.household[at], lines.time[at]
    span = int(lines.time.max(initial=0)) + 2
    key = lines.household * span + lines.time
    first = np.searchsorted(key, household * span)
    return first, np.searchsorted(key, household * span + time) - first
