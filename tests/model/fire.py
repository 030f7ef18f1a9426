"""Work of the processes of `test_interformer_fire.py`; each is a fork of a server that has imported PyTorch."""

from __future__ import annotations

import multiprocessing
import resource
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from delimited_tables import layout_rows, write_table
from interformer.data import Splits, load_schema, read_csv
from interformer.data.delimited import store

LAYOUT = "taobao_ad_x1"
ARRAYS = ("dense", "categorical", "events", "first", "last", "label", "user")
_CONTEXT = multiprocessing.get_context("forkserver")


def write_files(directory: Path, rows: int) -> Path:
    """The two files of a data set."""
    directory.mkdir(exist_ok=True)
    write_table(directory / "train.csv", layout_rows(LAYOUT, 0, rows))
    write_table(directory / "test.csv", layout_rows(LAYOUT, 1, 10))
    return directory


def read(directory: Path) -> Splits:
    """Read through the cache beside the files."""
    return read_csv(directory, load_schema(LAYOUT), cache=directory / "cache")


def same_splits(first: Splits, second: Splits) -> bool:
    """Whether the splits are equal, bit by bit."""
    pairs = zip(first.parts().values(), second.parts().values(), strict=True)
    return first.schema == second.schema and all(
        torch.equal(getattr(a, x), getattr(b, x)) for a, b in pairs for x in ARRAYS
    )


def start(target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Any]:
    """A process that calls `target(*arguments, connection)`, and this end of the connection."""
    _CONTEXT.set_forkserver_preload(["interformer.experiments.worker", "torch._dynamo"])
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=target, args=(*arguments, sender))
    process.start()
    sender.close()
    return process, receiver


def answers(started: list[tuple[BaseProcess, Any]]) -> list[Any]:
    """The message of each process; None for one that ended without a message."""
    result = []
    for process, connection in started:
        try:
            result.append(connection.recv() if connection.poll(100) else "no answer")
        except EOFError:
            result.append(None)
        process.join(100)
    return result


def read_again_and_again(directory: Path, times: int, touch: bool, connection: Any) -> None:
    """Read repeatedly and compare with `expected`; `touch` changes the modification time before each reading."""
    warnings.simplefilter("ignore")
    wrong, expected = 0, None
    try:
        for _ in range(times):
            if touch:
                (directory / "train.csv").touch()
            try:
                actual = read(directory)
            except ValueError as error:
                if not (touch and "do not change" in str(error)):
                    raise
                continue
            expected = expected or actual
            wrong += not same_splits(actual, expected)
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(wrong)


def build(directory: Path, connection: Any) -> None:
    """Build slowly, so that a kill can hit any point."""
    connection.send("go")
    read(directory)
    connection.send("done")


def build_on_a_full_disk(directory: Path, room: int, connection: Any) -> None:
    """Build with files limited to `room` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        read(directory)
    except OSError as error:
        connection.send(str(error))
    else:
        connection.send("done")


def generation(directory: Path) -> Path:
    """The only generation of the only data set in the cache."""
    (place,) = (directory / "cache").iterdir()
    (result,) = (path for path in place.iterdir() if path.name != store.LOCK)
    return result
