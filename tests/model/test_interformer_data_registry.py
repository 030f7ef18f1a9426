"""Readers by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from delimited_tables import layout_rows, write_table
from interformer.data import READERS, SyntheticLaw, read, read_beauty, read_csv, synthesize


def test_a_reader_by_name_is_the_reader(tmp_path: Path) -> None:
    assert list(READERS) == ["movielens", "beauty", "completejourney", "csv", "synthetic"]
    (tmp_path / "Beauty.txt").write_text("1 2 3 4 5\n2 6 7 8 9\n")
    named, plain = read("beauty", tmp_path, max_history=2, seed=3), read_beauty(tmp_path, max_history=2, seed=3)
    assert torch.equal(named.train.categorical, plain.train.categorical)
    assert named.test.lengths.max() == 2
    law = {"num_users": 20, "seed": 4}
    assert torch.equal(read("synthetic", **law).train.label, synthesize(SyntheticLaw(**law)).train.label)
    for file in ("train.csv", "test.csv"):
        write_table(tmp_path / file, layout_rows("kuai_video_x1", 0, 30))
    named, plain = read("csv", tmp_path, schema="kuai_video_x1"), read_csv(tmp_path, "kuai_video_x1")
    assert torch.equal(named.valid.events, plain.valid.events)


@pytest.mark.parametrize(
    ("reader", "path", "options", "message"),
    [
        ("parquet", "x", {}, "reader must be one of movielens, beauty, completejourney, .*; found 'parquet'"),
        ("beauty", None, {}, "reader 'beauty': wanted a path, found None"),
        ("synthetic", "x", {}, "reader 'synthetic': wanted no path, found 'x'"),
        ("beauty", "x", {"valid": 1}, "must be among max_history, negatives, seed; found 'valid'"),
        ("synthetic", None, {"users": 1}, "options must be among num_users, .* found 'users'"),
        ("csv", "x", {"cache": "y"}, "reader 'csv': wanted the option 'schema'; found cache"),
    ],
)
def test_what_no_reader_has_is_named(reader: str, path: str | None, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(reader, path, **options)
