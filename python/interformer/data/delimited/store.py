"""The compact form of one data set on disk: written whole or not at all, checked and mapped into memory when loaded.

CACHE/NAME-WHAT/lock             held by who builds
CACHE/NAME-WHAT/STATE-TOKEN/     one generation: a file for each array, and what was written there, about.json
CACHE/NAME-WHAT/building-TOKEN/  one that is not finished, or that a kill left; the next builder removes it

A generation gets its name when all of it is on the disk, and is never written to again: what a reader has mapped stays
as it is, and arrays of two generations never meet. Readers take no lock; who finds nothing to read takes it and builds.
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

FORMAT = 2  # of a generation; another one makes it stale
ABOUT = "about.json"
LOCK = "lock"
BUILDING = "building-"
# The arrays: what kind of number each has, and on which side of the schema it has its columns (axis 1), if any.
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
    """A generation that does not hold what was written there."""


class NoStoreError(LookupError):
    """There is no generation of this state of the files."""


def bytes_of(values: NDArray[Any], kind: Any) -> memoryview:
    """The numbers as `kind`, as they lie in memory."""
    return np.ascontiguousarray(values, kind).reshape(-1).view(np.uint8).data


class InMemory:
    """Arrays of known sizes that are filled from the front, in memory."""

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

    By plain writes: a full disk is then an error, where memory that is mapped to a file would end the process.
    """

    def __init__(self, path: Path, kind: str, shape: tuple[int, ...]) -> None:
        self.values = np.broadcast_to(np.empty((), kind), shape)  # for its kind and shape alone
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
    """Where the arrays of a data set are written: to files in `folder`, or to memory without one."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.arrays: dict[str, Any] = {}

    def array(self, name: str, shape: tuple[int, ...]) -> InMemory:
        """A new array, to append to and to close."""
        kind, _ = KINDS[name]
        new = InMemory(kind, shape) if self.folder is None else InFile(self.folder / f"{name}.npy", kind, shape)
        self.arrays[name] = new
        return new

    def close(self) -> None:
        """Lets go of files that an error left open."""
        for array in self.arrays.values():
            if isinstance(array, InFile):
                with contextlib.suppress(OSError):  # of a full disk, which was told already
                    array.file.close()

    def about(self) -> dict[str, Any]:
        """What must be found when the files are read."""
        return {
            name: {"kind": array.values.dtype.str, "shape": list(array.values.shape), "crc32": array.checksum}
            for name, array in self.arrays.items()
        }


class About(NamedTuple):
    """What is written beside the arrays: the model's schema, rows of each part, and each array's kind and checksum."""

    schema: Schema
    sizes: tuple[int, int, int]
    arrays: dict[str, dict[str, Any]]


# Writes the arrays to the target; returns the model's schema and the rows of each part, by these names.
Build = Callable[[Target], dict[str, Any]]


def identify(schema: CsvSchema, directory: Path, max_length: int) -> str:
    """What the compact form is of: schema and place."""
    return _digest(
        {"schema": dataclasses.asdict(schema), "directory": str(directory.resolve()), "max_length": max_length}
    )


def state_of(schema: CsvSchema, directory: Path) -> str:
    """The state of the files that the compact form is made from."""
    state = {part: (directory / file).stat() for part, file in schema.files.items()}
    files = {part: [stat.st_size, stat.st_mtime_ns] for part, stat in state.items()}
    return _digest({"format": FORMAT, "files": files})


def _digest(plain: object) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def load_or_build(name: str, what: str, state: Callable[[], str], cache: Path, build: Build) -> Splits:
    """The data set `name` from its place under `cache`, built anew where that is missing, stale or broken.

    The last two are said by a warning. Of several processes one builds, and the others wait for it.
    """
    place = cache / f"{name}-{what}"
    try:
        return _newest(name, place, state())
    except (NoStoreError, BrokenStoreError):
        pass  # perhaps about to be replaced, which under the lock it is not
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / LOCK):
        now = state()
        try:
            return _newest(name, place, now)
        except NoStoreError:
            if any(not entry.name.startswith(BUILDING) for entry in _others(place)):
                warnings.warn(f"{place} is stale: its files have changed since; it is built anew", stacklevel=3)
        except BrokenStoreError as error:
            warnings.warn(f"{place} is broken: {error}; it is built anew", stacklevel=3)
        for entry in _others(place):  # nobody else builds: what is not finished never will be
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        token = secrets.token_hex(8)
        fresh = place / f"{BUILDING}{token}"
        fresh.mkdir()
        try:
            _write(fresh, build, now, state)
            whole = place / f"{now}-{token}"
            os.rename(fresh, whole)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return load(name, whole)


def _others(place: Path) -> list[Path]:
    return [entry for entry in place.iterdir() if entry.name != LOCK]


def _newest(name: str, place: Path, state: str) -> Splits:
    """The generation of this state of the files."""
    reason: BrokenStoreError | None = None
    for generation in place.glob(f"{state}-*"):
        try:
            return load(name, generation)
        except BrokenStoreError as error:
            reason = error
    raise reason or NoStoreError(state)


def _write(fresh: Path, build: Build, now: str, state: Callable[[], str]) -> None:
    target = Target(fresh)
    with contextlib.closing(target):
        about = build(target)
    _want_unchanged(now, state)
    write_sealed(fresh / ABOUT, {**about, "arrays": target.about()})
    descriptor = os.open(fresh, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _want_unchanged(before: str, state: Callable[[], str]) -> None:
    if state() != before:
        raise ValueError("read_csv: wanted files that stay as they are while they are read, found one that was changed")


def build_in_memory(name: str, state: Callable[[], str], build: Build) -> Splits:
    """The data set `name`, of which nothing is kept."""
    target, before = Target(), state()
    about = build(target)
    _want_unchanged(before, state)
    arrays = {array: torch.from_numpy(made.values) for array, made in target.arrays.items()}
    return _splits(name, Schema.from_dict(about["schema"]), about["sizes"], arrays)


# ---------------------------------------------------------------- reading


def read_about(place: Path) -> About:
    """What is written beside the arrays."""
    try:
        about = read_sealed(place / ABOUT)
        train, valid, test = map(int, about["sizes"])
        return About(Schema.from_dict(about["schema"]), (train, valid, test), dict(about["arrays"]))
    except DamagedFileError as error:
        raise BrokenStoreError(f"{ABOUT} cannot be read ({str(error).removeprefix(f'{place / ABOUT}: ')})") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenStoreError(f"{ABOUT} cannot be read ({error!r})") from error


def load(name: str, place: Path) -> Splits:
    """The splits whose arrays lie in `place`; arrays stay on disk until they are used.

    All of them are read once, for their checksums.

    Raises:
        BrokenStoreError: an array is missing, or has another byte than what was written.
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
        raise BrokenStoreError(f"{path.name} cannot be read (it has another checksum than what was written)")
    # Copy on write, for torch takes no memory that cannot be written; nothing ever reaches the file.
    array: NDArray[Any] = np.load(path, mmap_mode="c" if np.prod(written["shape"]) else None, allow_pickle=False)
    return array


def _splits(name: str, schema: Schema, sizes: tuple[int, int, int], arrays: dict[str, torch.Tensor]) -> Splits:
    """The parts, which follow one another in the arrays.

    Raises:
        ValueError: an array is not of its kind or shape, or holds a number that no builder writes.
    """
    total = sum(sizes)
    for array, (kind, side) in KINDS.items():
        rows = int(arrays["last"].max()) if array == "events" else total
        shape = (rows,) if side is None else (rows, len(getattr(schema, side)))
        found = arrays[array]
        if tuple(found.shape) != shape or found.numpy().dtype != np.dtype(kind):
            raise ValueError(
                f"{array} is {found.numpy().dtype.str} of shape {tuple(found.shape)}, wanted {kind} of {shape}"
            )
    _want_ranges(schema, arrays)
    events = arrays.pop("events")
    train, valid, test = (
        Clicks(schema=schema, events=events, **{array: values[start:stop] for array, values in arrays.items()})
        for start, stop in pairwise((0, *accumulate(sizes)))
    )
    return Splits(name, train, valid, test)


def _want_ranges(schema: Schema, arrays: dict[str, torch.Tensor]) -> None:
    """Raises unless every id has its row of a table, every history its events, and every number is one."""
    for array, side in (("categorical", schema.categorical), ("events", schema.sequences)):
        for column, field in enumerate(side):
            ids = arrays[array][:, column]
            if len(ids) and not (ids.min() >= 0 and ids.max() < schema.tables[field.table]):
                raise ValueError(f"{array} has an id of {field.name!r} outside 0 to {schema.tables[field.table] - 1}")
    first, last = arrays["first"], arrays["last"]
    if first.min() < 0 or (last < first).any():
        raise ValueError("first and last are no spans of events")
    if not arrays["dense"].isfinite().all():
        raise ValueError("dense holds a number that is not finite")
    if ((arrays["label"] != 0) & (arrays["label"] != 1)).any():
        raise ValueError("label holds a number other than 0 and 1")
