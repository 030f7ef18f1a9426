"""Impressions from delimited files described by a schema: one row per impression, with histories in its cells."""

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

    Files are streamed: memory holds the vocabularies and a few numbers per row. The ids of a table are numbered from 1;
    0 stands for empty cells and for ids seen in the training part never, or less often than the schema's `min_count`.
    Vocabularies and counts come from the training part alone. Item embeddings in separate files, as in KuaiVideo_x1,
    are not read: models learn their own.

    Args:
        schema: a `CsvSchema`, its YAML file, or the name of a shipped one: `amazon_electronics_x1`, `taobao_ad_x1`,
            `kuai_video_x1`.
        max_history: number of latest events that histories keep, if it is below the schema's `max_length`.
        cache: directory of compact forms of data sets, each in a subdirectory. They are checked against their
            checksums and memory-mapped. A damaged form, or one of files whose size or modification time has changed, is
            rebuilt with a warning. Of several processes, one builds and the others wait. Without a cache, all data is
            held in memory in the end, and passes through unnamed temporary files.
        progress: progress bars for the bytes read; by default on standard error, if it is a terminal.

    Raises:
        FileNotFoundError: there is no such file or schema.
        MalformedFileError: a column is missing or duplicate, a row has a wrong number of cells, a cell is not a number
            or not finite in float32, a label is not 0 or 1, a user is empty, the histories of a row differ in length,
            a quote is not closed, or bytes are not UTF-8; with file, line and column (counted in cells).
        SchemaError: the schema is inconsistent.
        ValueError: a wrong argument, a part without rows, or a file that changed while it was read.
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
            return encode(schema, directory, target, max_length, lambda count: bar.advance(task, count))

    state = functools.partial(state_of, schema, directory)
    if cache is None:
        return build_in_memory(schema.name, state, build)
    return load_or_build(schema.name, identify(schema, directory, max_length), state, Path(cache), build)


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
