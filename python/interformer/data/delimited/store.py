"""The compact form of one data set in a directory: written whole or not at all, mapped into memory when loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from interformer.data.clicks import Clicks, Splits
from interformer.data.delimited.spec import CsvSchema
from interformer.schema import Schema

FORMAT = 1  # of the directory; another one makes it stale
ABOUT = "about.json"
Build = Callable[[Path], dict[str, Any]]


class BrokenStoreError(ValueError):
    """A directory that does not hold what was written there."""


class About(NamedTuple):
    """What is written beside the arrays: the state of the files, the model's schema, rows of each part."""

    state: str
    schema: Schema
    sizes: tuple[int, int, int]


def fingerprint(schema: CsvSchema, directory: Path, max_length: int) -> tuple[str, str]:
    """What the compact form is of (schema and place), and the state of the files that it was made from."""
    what = {"schema": dataclasses.asdict(schema), "directory": str(directory.resolve()), "max_length": max_length}
    state = {part: (directory / file).stat() for part, file in schema.files.items()}
    files = {part: [stat.st_size, stat.st_mtime_ns] for part, stat in state.items()}
    return _digest(what), _digest({"format": FORMAT, "files": files})


def _digest(plain: object) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def load_or_build(name: str, what: str, state: str, cache: Path, build: Build) -> Splits:
    """The data set `name` from its directory under `cache`, built anew where that is missing, stale or broken.

    The last two are said by a warning. `build` writes the arrays into the directory that it is given.
    """
    place = cache / f"{name}-{what}"
    if place.exists():
        reason = "stale: its files have changed since"
        try:
            if read_about(place).state == state:
                return load(name, place)
        except BrokenStoreError as error:
            reason = f"broken: {error}"
        warnings.warn(f"{place} is {reason}; it is built anew", stacklevel=3)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as around:
        whole = Path(around) / "whole"
        whole.mkdir()
        _write_about(whole, build(whole) | {"state": state})
        shutil.rmtree(place, ignore_errors=True)
        try:
            os.replace(whole, place)
        except OSError:
            if not place.exists():  # else another process was faster, with the same arrays
                raise
    return load(name, place)


def build_in_memory(name: str, build: Build) -> Splits:
    """The data set `name`, by way of a directory that is gone afterwards."""
    with tempfile.TemporaryDirectory() as fresh:
        _write_about(Path(fresh), build(Path(fresh)) | {"state": ""})
        return load(name, Path(fresh), mapped=False)


def _write_about(place: Path, about: dict[str, Any]) -> None:
    (place / ABOUT).write_text(json.dumps(about, indent=1))


def read_about(place: Path) -> About:
    """What is written beside the arrays."""
    try:
        about = json.loads((place / ABOUT).read_text())
        train, valid, test = map(int, about["sizes"])
        return About(about["state"], Schema.from_dict(about["schema"]), (train, valid, test))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenStoreError(f"{ABOUT} cannot be read ({error!r})") from error


def load(name: str, place: Path, mapped: bool = True) -> Splits:
    """The splits whose arrays lie in `place`; arrays stay on disk until they are used, if `mapped`.

    Raises:
        BrokenStoreError: an array is missing, cut off, or not of its shape.
    """
    _, schema, sizes = read_about(place)
    total = sum(sizes)
    shapes: dict[str, tuple[int, ...]] = {
        "categorical": (total, len(schema.categorical)),
        "label": (total,),
        "user": (total,),
        "first": (total,),
        "last": (total,),
    }
    if schema.dense:
        shapes["dense"] = (total, len(schema.dense))
    arrays = {array: _load(place / f"{array}.npy", shape, mapped) for array, shape in shapes.items()}
    ends = int(arrays["last"].max())
    events = _load(place / "events.npy", (ends, len(schema.sequences)), mapped)
    arrays.setdefault("dense", torch.empty(total, 0))
    train, valid, test = (
        Clicks(schema=schema, events=events, **{array: values[start:stop] for array, values in arrays.items()})
        for start, stop in pairwise((0, *accumulate(sizes)))
    )
    return Splits(name, train, valid, test)


def _load(path: Path, shape: tuple[int, ...], mapped: bool) -> Tensor:
    try:
        # Copy on write, for torch takes no memory that cannot be written; nothing ever reaches the file.
        array = np.load(path, mmap_mode="c" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BrokenStoreError(f"{path.name} cannot be read ({error})") from error
    if array.shape != shape:
        raise BrokenStoreError(f"{path.name} has the shape {array.shape}, wanted {shape}")
    return torch.from_numpy(array)
