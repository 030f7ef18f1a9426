"""What the processes of `test_interformer_fire.py` do; each is a fork of a server that has imported PyTorch."""

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
    """By way of the cache beside the files."""
    return read_csv(directory, load_schema(LAYOUT), cache=directory / "cache")


def same(one: Splits, two: Splits) -> bool:
    """Bit by bit."""
    pairs = zip(one.parts().values(), two.parts().values(), strict=True)
    return one.schema == two.schema and all(torch.equal(getattr(a, x), getattr(b, x)) for a, b in pairs for x in ARRAYS)


def start(target: Callable[..., None], *arguments: object) -> tuple[BaseProcess, Any]:
    """A process that calls `target(*arguments, connection)`, and this end of the connection."""
    _CONTEXT.set_forkserver_preload(["interformer.experiments.worker", "torch._dynamo"])
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=target, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


def answers(started: list[tuple[BaseProcess, Any]]) -> list[Any]:
    """What each process sent; None of one that ended without a word."""
    found = []
    for process, connection in started:
        try:
            found.append(connection.recv() if connection.poll(100) else "no answer")
        except EOFError:
            found.append(None)
        process.join(100)
    return found


def read_again_and_again(directory: Path, times: int, touch: bool, connection: Any) -> None:
    """Reads and compares with what was read before; `touch`: a new time of change before each reading."""
    warnings.simplefilter("ignore")
    wrong, expected = 0, None
    try:
        for _ in range(times):
            if touch:
                (directory / "train.csv").touch()
            try:
                found = read(directory)
            except ValueError as error:
                if not (touch and "stay as they are" in str(error)):
                    raise
                continue
            expected = expected or found
            wrong += not same(found, expected)
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(wrong)


def build(directory: Path, connection: Any) -> None:
    """Builds, slowly enough to be killed anywhere in it."""
    connection.send("go")
    read(directory)
    connection.send("done")


def build_on_a_full_disk(directory: Path, room: int, connection: Any) -> None:
    """With files of `room` bytes at most."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        read(directory)
    except OSError as error:
        connection.send(str(error))
    else:
        connection.send("done")


def generation(directory: Path) -> Path:
    """The only one of the only data set in the cache."""
    (place,) = (directory / "cache").iterdir()
    (found,) = (path for path in place.iterdir() if path.name != store.LOCK)
    return found
