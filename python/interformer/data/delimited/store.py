"""The compact form of one data set on disk: written atomically, verified and memory-mapped when loaded.

CACHE/NAME-ID/lock             held by the process that builds
CACHE/NAME-ID/STATE-TOKEN/     one generation: a file for each array, and about.json, which describes them
CACHE/NAME-ID/building-TOKEN/  an unfinished generation, or one left by a kill; the next builder removes it

A generation gets its name when it is completely on disk, and is never written to again: mapped arrays do not change,
and arrays of two generations are never mixed. Readers take no lock; a process that finds no generation takes the lock
and builds one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import warnings
import zlib
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.lib import format as npy
from numpy.typing import NDArray

from interformer.data.clicks import Clicks, Splits
from interformer.data.delimited.spec import CsvSchema
from interformer.files import DamagedFileError, naming, read_sealed, write_sealed
from interformer.schema import Schema

FORMAT = 2  # format of a generation; generations of other formats are stale
ABOUT = "about.json"
LOCK = "lock"
BUILDING = "building-"
# The arrays: dtype, and the field of the schema that describes its columns (axis 1), if any.
KINDS = {
    "dense": ("<f4", "dense"),
    "categorical": ("<i4", "categorical"),
    "events": ("<i4", "sequences"),
    "first": ("<i8", None),
    "last": ("<i8", None),
    "label": ("<f4", None),
    "user": ("<i4", None),
}


class BrokenStoreError(ValueError):
    """A generation whose content is not what was written."""


class MissingStoreError(LookupError):
    """There is no generation of this state of the files."""


def bytes_of(values: NDArray[Any], kind: Any) -> memoryview:
    """The memory of the numbers, converted to `kind`."""
    return np.ascontiguousarray(values, kind).reshape(-1).view(np.uint8).data


class InMemory:
    """An array of known size in memory, filled from the front."""

    def __init__(self, kind: str, shape: tuple[int, ...]) -> None:
        self.values = np.empty(shape, kind)
        self.filled = 0

    def append(self, values: NDArray[Any]) -> None:
        self.values[self.filled : self.filled + len(values)] = values
        self.filled += len(values)

    def close(self) -> None:
        if self.filled != len(self.values):
            raise AssertionError(f"wanted {len(self.values)} rows, found {self.filled}")


class InFile(InMemory):
    """The same in a `.npy` file, with the checksum of the whole file.

    It uses plain writes, so that a full disk raises an error; with a memory-mapped file it would kill the process.
    """

    def __init__(self, path: Path, kind: str, shape: tuple[int, ...]) -> None:
        self.values = np.broadcast_to(np.empty((), kind), shape)  # holds dtype and shape, without memory
        self.filled = self.checksum = 0
        self.path = path
        self.file = path.open("xb")
        npy.write_array_header_1_0(self.file, {"descr": kind, "fortran_order": False, "shape": shape})
        self.file.flush()
        self.checksum = zlib.crc32(path.read_bytes())

    def append(self, values: NDArray[Any]) -> None:
        data = bytes_of(values, self.values.dtype)
        with naming(self.path):
            self.file.write(data)
        self.checksum = zlib.crc32(data, self.checksum)
        self.filled += len(values)

    def close(self) -> None:
        super().close()
        with naming(self.path), self.file:
            self.file.flush()
            os.fsync(self.file.fileno())


class Target:
    """The destination of a data set's arrays: files in `folder`, or memory without a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.arrays: dict[str, Any] = {}

    def array(self, name: str, shape: tuple[int, ...]) -> InMemory:
        """A new array; the caller appends to it and closes it."""
        kind, _ = KINDS[name]
        array = InMemory(kind, shape) if self.folder is None else InFile(self.folder / f"{name}.npy", kind, shape)
        self.arrays[name] = array
        return array

    def close(self) -> None:
        """Close files that an error left open."""
        for array in self.arrays.values():
            if isinstance(array, InFile):
                with contextlib.suppress(OSError):  # A full disk has been reported by a write already.
                    array.file.close()

    def about(self) -> dict[str, Any]:
        """The dtype, shape and checksum of each array, to verify its file."""
        return {
            name: {"kind": array.values.dtype.str, "shape": list(array.values.shape), "crc32": array.checksum}
            for name, array in self.arrays.items()
        }


class About(NamedTuple):
    """The content of about.json: the model's schema, rows of each part, and dtype, shape and checksum of each array."""

    schema: Schema
    sizes: tuple[int, int, int]
    arrays: dict[str, dict[str, Any]]


# A function that writes the arrays to the target, and returns the entries `schema` and `sizes` of about.json.
Build = Callable[[Target], dict[str, Any]]


def identify(schema: CsvSchema, directory: Path, max_length: int) -> str:
    """The id of a compact form, which depends on schema, directory and `max_length`."""
    return _digest(
        {"schema": dataclasses.asdict(schema), "directory": str(directory.resolve()), "max_length": max_length}
    )


def state_of(schema: CsvSchema, directory: Path) -> str:
    """The state of the source files: their sizes and modification times."""
    state = {part: (directory / file).stat() for part, file in schema.files.items()}
    files = {part: [stat.st_size, stat.st_mtime_ns] for part, stat in state.items()}
    return _digest({"format": FORMAT, "files": files})


def _digest(plain: object) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def load_or_build(name: str, identity: str, state: Callable[[], str], cache: Path, build: Build) -> Splits:
    """The data set `name` from its place under `cache`, rebuilt if it is missing, stale or broken.

    A stale or broken one is reported by a warning. Of several processes one builds, and the others wait.
    """
    place = cache / f"{name}-{identity}"
    try:
        return _newest(name, place, state())
    except (MissingStoreError, BrokenStoreError):
        pass  # Another process may be replacing it, so look again under the lock.
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / LOCK):
        now = state()
        try:
            return _newest(name, place, now)
        except MissingStoreError:
            if any(not entry.name.startswith(BUILDING) for entry in _entries(place)):
                warnings.warn(f"{place} is stale: its files have changed since; it is rebuilt", stacklevel=3)
        except BrokenStoreError as error:
            warnings.warn(f"{place} is broken: {error}; it is rebuilt", stacklevel=3)
        for entry in _entries(place):  # Under the lock no other process builds, so unfinished entries are leftovers.
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        token = secrets.token_hex(8)
        unfinished = place / f"{BUILDING}{token}"
        unfinished.mkdir()
        try:
            _write(unfinished, build, now, state)
            generation = place / f"{now}-{token}"
            os.rename(unfinished, generation)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return load(name, generation)


def _entries(place: Path) -> list[Path]:
    return [entry for entry in place.iterdir() if entry.name != LOCK]


def _newest(name: str, place: Path, state: str) -> Splits:
    """The generation for this state of the source files."""
    reason: BrokenStoreError | None = None
    for generation in place.glob(f"{state}-*"):
        try:
            return load(name, generation)
        except BrokenStoreError as error:
            reason = error
    raise reason or MissingStoreError(state)


def _write(folder: Path, build: Build, now: str, state: Callable[[], str]) -> None:
    target = Target(folder)
    with contextlib.closing(target):
        about = build(target)
    _check_unchanged(now, state)
    write_sealed(folder / ABOUT, {**about, "arrays": target.about()})
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_unchanged(before: str, state: Callable[[], str]) -> None:
    if state() != before:
        raise ValueError("read_csv: wanted files that do not change while they are read, found one that was changed")


def build_in_memory(name: str, state: Callable[[], str], build: Build) -> Splits:
    """The data set `name` in memory, without a cache."""
    target, before = Target(), state()
    about = build(target)
    _check_unchanged(before, state)
    arrays = {array: torch.from_numpy(in_memory.values) for array, in_memory in target.arrays.items()}
    return _splits(name, Schema.from_dict(about["schema"]), about["sizes"], arrays)


# ---------------------------------------------------------------- reading


def read_about(place: Path) -> About:
    """Read about.json."""
    try:
        about = read_sealed(place / ABOUT)
        train, valid, test = map(int, about["sizes"])
        return About(Schema.from_dict(about["schema"]), (train, valid, test), dict(about["arrays"]))
    except DamagedFileError as error:
        raise BrokenStoreError(f"{ABOUT} cannot be read ({str(error).removeprefix(f'{place / ABOUT}: ')})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenStoreError(f"{ABOUT} cannot be read ({error!r})") from error


def load(name: str, place: Path) -> Splits:
    """The splits whose arrays are in `place`, memory-mapped after a pass over all of them for their checksums.

    Raises:
        BrokenStoreError: an array is missing or damaged.
    """
    schema, sizes, written = read_about(place)
    arrays = {}
    for array in KINDS:
        if array not in written:
            raise BrokenStoreError(f"{ABOUT} has no array {array!r}")
        arrays[array] = torch.from_numpy(_map(place / f"{array}.npy", written[array]))
    try:
        return _splits(name, schema, sizes, arrays)
    except ValueError as error:
        raise BrokenStoreError(str(error)) from error


def _map(path: Path, written: dict[str, Any]) -> NDArray[Any]:
    try:
        checksum = 0
        with path.open("rb") as file:
            while data := file.read(1 << 22):
                checksum = zlib.crc32(data, checksum)
    except OSError as error:
        raise BrokenStoreError(f"{path.name} cannot be read ({error})") from error
    if checksum != written["crc32"]:
        raise BrokenStoreError(f"{path.name} cannot be read (its checksum does not match)")
    # Copy on write, because torch needs writable memory; nothing is written to the file.
    array: NDArray[Any] = np.load(path, mmap_mode="c" if np.prod(written["shape"]) else None, allow_pickle=False)
    return array


def _splits(name: str, schema: Schema, sizes: tuple[int, int, int], arrays: dict[str, torch.Tensor]) -> Splits:
    """The parts, which are consecutive slices of the arrays.

    Raises:
        ValueError: an array has a wrong dtype or shape, or holds an invalid number.
    """
    total = sum(sizes)
    for array, (kind, side) in KINDS.items():
        rows = int(arrays["last"].max()) if array == "events" else total
        shape = (rows,) if side is None else (rows, len(getattr(schema, side)))
        values = arrays[array].numpy()
        if values.shape != shape or values.dtype != np.dtype(kind):
            raise ValueError(f"{array} is {values.dtype.str} of shape {values.shape}, wanted {kind} of {shape}")
    _check_ranges(schema, arrays)
    events = arrays.pop("events")
    train, valid, test = (
        Clicks(schema=schema, events=events, **{array: values[start:stop] for array, values in arrays.items()})
        for start, stop in pairwise((0, *accumulate(sizes)))
    )
    return Splits(name, train, valid, test)


def _check_ranges(schema: Schema, arrays: dict[str, torch.Tensor]) -> None:
    """Raise unless every id is in its table, every history is a span of events, and every number is valid."""
    for array, side in (("categorical", schema.categorical), ("events", schema.sequences)):
        for column, field in enumerate(side):
            ids = arrays[array][:, column]
            if len(ids) and not (ids.min() >= 0 and ids.max() < schema.tables[field.table]):
                raise ValueError(f"{array} has an id of {field.name!r} outside 0 to {schema.tables[field.table] - 1}")
    first, last = arrays["first"], arrays["last"]
    if first.min() < 0 or (last < first).any():
        raise ValueError("first and last are not spans of events")
    if not arrays["dense"].isfinite().all():
        raise ValueError("dense holds a number that is not finite")
    if ((arrays["label"] != 0) & (arrays["label"] != 1)).any():
        raise ValueError("label holds a number other than 0 and 1")
