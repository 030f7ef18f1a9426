"""Tables for the tests of `read_csv`: tiny files in its layouts, and the expected result, computed row by row."""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from interformer.data import CsvSchema, Splits

Row = dict[str, str]

LAYOUTS = {
    "amazon_electronics_x1": "label user_id item_id cate_id item_history cate_history",
    "taobao_ad_x1": "clk btag_his cate_his brand_his userid cms_segid cms_group_id final_gender_code age_level "
    "pvalue_level shopping_level occupation new_user_class_level adgroup_id cate_id campaign_id customer brand price "
    "pid btag",
    "kuai_video_x1": "timestamp user_id item_id is_click is_like is_follow pos_items neg_items",
}


def layout_rows(name: str, seed: int, count: int) -> list[Row]:
    """Rows of a shipped layout, with histories of up to 120 events and long-tailed ids."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        length = rng.choice([0, 1, 3, 120])
        row = {column: str(min(int(rng.expovariate(0.2)), 40)) for column in LAYOUTS[name].split()}
        row |= {column: str(rng.randint(0, 1)) for column in ("label", "clk", "is_click") if column in row}
        row |= {"timestamp": str(i // 3)} if "timestamp" in row else {"price": f"{rng.expovariate(0.01):.2f}"}
        for column in row:
            if column.endswith(("_history", "_his", "_items")):
                events = length if name == "amazon_electronics_x1" else max(length - rng.randint(0, 2), 0)
                row[column] = "^".join(str(min(int(rng.expovariate(0.2)), 40)) for _ in range(events))
        rows.append({column: row[column] for column in LAYOUTS[name].split()})
    return rows


def write_table(path: Path, rows: Sequence[Row], separator: str = ",", header: bool = True) -> Path:
    """Write rows by the standard library."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([list(rows[0])] if header else [])
        writer.writerows([list(row.values()) for row in rows])
    return path


@dataclass(frozen=True)
class Expected:
    """One part as defined by the schema, with texts in place of the reader's ids."""

    rows: Sequence[Row]
    schema: CsvSchema
    max_length: int

    def history(self, row: Row) -> list[tuple[str, ...]]:
        """Events of a row, oldest first, each with its text in every column; "" for a missing one."""
        sequences = self.schema.sequences
        columns = []
        for ids in sequences.fields:
            texts = row[ids.column].split(sequences.separator) if row[ids.column] else []
            texts = texts[::-1] if sequences.order == "newest_first" else texts
            columns.append(texts[max(len(texts) - self.max_length, 0) :])
        longest = max(map(len, columns))
        return list(zip(*([""] * (longest - len(texts)) + texts for texts in columns), strict=True))

    def counts(self) -> dict[str, Counter[str]]:
        """The number of occurrences of each text in this part, by table."""
        counts: dict[str, Counter[str]] = {table: Counter() for table in self.schema.tables}
        for row in self.rows:
            for ids in self.schema.categorical:
                counts[ids.table][row[ids.column]] += 1
            for event in self.history(row):
                for ids, text in zip(self.schema.sequences.fields, event, strict=True):
                    counts[ids.table][text] += 1
        return counts


def check(splits: Splits, parts: dict[str, Sequence[Row]], schema: CsvSchema, max_length: int) -> None:
    """Check every id of every row: equal texts of a table have equal ids, and texts rare in training have id 0."""
    counts = Expected(parts["train"], schema, max_length).counts()
    ids_of: dict[str, dict[str, int]] = {table: {} for table in schema.tables}

    def check_id(table: str, text: str, actual: int) -> None:
        rare = not text or counts[table][text] < schema.tables[table]
        assert (actual == 0) == rare, (table, text, actual, counts[table][text])
        assert ids_of[table].setdefault(text, actual) == actual

    users: dict[str, int] = {}
    for name, part in splits.parts().items():
        expected = Expected(parts[name], schema, max_length)
        assert len(part) == len(expected.rows)
        for place, row in enumerate(expected.rows):
            batch = part.batch(torch.tensor([place]))
            assert batch.sequences.dtype == batch.categorical.dtype == batch.user.dtype == torch.int64
            assert batch.label.item() == float(row[schema.label])
            assert users.setdefault(row[schema.user], int(batch.user)) == int(batch.user)
            for ids, actual in zip(schema.categorical, batch.categorical[0].tolist(), strict=True):
                check_id(ids.table, row[ids.column], actual)
            history = expected.history(row)
            assert len(history) == len(batch.sequences)
            for event, numbers in zip(history, batch.sequences.tolist(), strict=True):
                for ids, text, actual in zip(schema.sequences.fields, event, numbers, strict=True):
                    check_id(ids.table, text, actual)
    assert len(set(users.values())) == len(users)
    for table, numbers in ids_of.items():
        known_ids = sorted(number for number in numbers.values() if number)
        assert known_ids == sorted(set(known_ids))
        assert splits.schema.tables[table] == 1 + sum(
            count >= schema.tables[table] for text, count in counts[table].items() if text
        )
