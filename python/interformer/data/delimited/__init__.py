"""Impressions from delimited files whose columns a schema explains: one row an impression, histories in its cells."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from interformer import checks
from interformer.data.clicks import Splits
from interformer.data.delimited.compact import encode
from interformer.data.delimited.spec import CsvSchema, SchemaError, load_schema, shipped_schemas
from interformer.data.delimited.store import Target, build_in_memory, identify, load_or_build, state_of

__all__ = ["CsvSchema", "SchemaError", "load_schema", "read_csv", "shipped_schemas"]


def read_csv(
    directory: Path | str,
    schema: CsvSchema | Path | str,
    *,
    max_history: int | None = None,
    cache: Path | str | None = None,
    progress: Progress | None = None,
) -> Splits:
    """The three parts of the data set in `directory`.

    Files are streamed: in memory are the vocabularies and a few numbers a row. Every id is numbered from 1 within its
    table; 0 stands for what is empty, was never seen in the training part, or less often than the schema's `min_count`.
    Vocabularies and counts come from the training part alone. Item embeddings in files of their own, as KuaiVideo_x1
    has, are not read: models learn their own.

    Args:
        schema: a `CsvSchema`, its YAML file, or the name of a shipped one: `amazon_electronics_x1`, `taobao_ad_x1`,
            `kuai_video_x1`.
        max_history: histories keep their latest so many events, if that is fewer than the schema's `max_length`.
        cache: where compact forms of data sets are kept, each in a directory of its own. They are read once against
            their checksums and mapped into memory, and built anew, with a warning, where they are damaged or a file's
            size, time of change or inode differs. Of several processes that want one, one builds and the others wait.
            Without a cache everything is held in memory in the end, by way of temporary files without a name.
        progress: where to show the bytes read; by default on the terminal, if standard error is one.

    Raises:
        FileNotFoundError: no such file or schema.
        MalformedFileError: naming file, line and column (counted in cells): a column missing or there twice, a wrong
            number of cells, a number that is none or not finite where it is kept (in float32), a label other than 0
            and 1, a user that is empty, histories of one row that differ in length, quotes that do not close, bytes
            that are not UTF-8.
        SchemaError: a schema that does not hold together.
        ValueError: a bad argument, a part without rows, or a file that was changed while it was read.
    """
    schema = load_schema(schema)
    if max_history is not None:
        checks.kind("read_csv: max_history", max_history, int)
        if max_history < 1:
            raise ValueError(f"read_csv: wanted max_history >= 1, found {max_history}")
    directory = Path(directory)
    paths = [directory / file for file in schema.files.values()]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; the schema {schema.name!r} wants it")
    max_length = min(max_history or schema.sequences.max_length, schema.sequences.max_length)
    size = sum(path.stat().st_size for path in paths)

    def build(target: Target) -> dict[str, object]:
        with nullcontext(progress) if progress is not None else _bar() as bar:
            task = bar.add_task(schema.name, total=size)
            return encode(schema, directory, target, max_length, lambda more: bar.advance(task, more))

    state = functools.partial(state_of, schema, directory)
    if cache is None:
        return build_in_memory(schema.name, state, build)
    return load_or_build(schema.name, identify(schema, directory, max_length), state, Path(cache), build)


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
