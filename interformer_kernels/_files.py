"""Files that are written whole or not at all, and JSON that tells when a byte of it has changed.

A write goes to a neighbour with a name that nobody can guess, is flushed to the disk, and takes the target's place by a
rename: readers see the old file or the new one, and so does whoever comes after a kill or a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # no POSIX: left-overs of killed writers stay
    fcntl = None  # type: ignore[assignment]

_ENDING = ".interformer.tmp"
_SEAL = "sha256"


class DamagedFileError(ValueError):
    """A file that does not hold what was written there; the message is one line and names it."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` of what is done inside, a full disk say, names `path` where it names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` at the end, or is gone where anything raises.

    Safe for threads and processes: of several writers, each one's file is whole, and the last one's stays. The mode is
    that of the file it replaces, or what `open` would give. Where `path` is a symbolic link, the link is replaced and
    what it points to stays as it was. What is no regular file (`/dev/stdout`, a pipe) is written to directly.
    Neighbours that killed writers of `path` left are removed.

    Raises:
        OSError: naming `path` (a full disk, no right to write, a directory).
    """
    path = Path(path)
    with naming(path):
        mode = _mode_of(path)
        if mode is not None and not stat.S_ISREG(mode):
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, "wanted a file, found a directory", str(path))
            with open(path, "wb") as special:
                yield special
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path)
        neighbour, descriptor = _claim(path)
        try:
            if mode is not None and not path.is_symlink():
                os.fchmod(descriptor, stat.S_IMODE(mode))
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(neighbour, path)  # still locked: nobody takes it for a left-over
        except BaseException:
            neighbour.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def append_line(path: Path, record: dict[str, Any]) -> None:
    """`record` as one line of JSON at the end of `path`, by one write: lines of several processes do not mix, and what
    is there stands, whatever becomes of the writer.
    """
    line = json.dumps(finite(record), allow_nan=False) + "\n"
    with naming(path), open(path, "ab", buffering=0) as file:
        file.write(line.encode())


def want_writable(path: Path) -> None:
    """Raises the `OSError` that writing `path` would: better before a long computation than after it."""
    mode = _mode_of(path)
    if mode is None or stat.S_ISREG(mode):
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            neighbour, descriptor = _claim(path)
            os.close(descriptor)
            neighbour.unlink()
    elif stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "wanted a file, found a directory", str(path))


def _mode_of(path: Path) -> int | None:
    """Of what `path` leads to; None where there is nothing yet."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _claim(path: Path) -> tuple[Path, int]:
    """A new neighbour of `path`, locked for as long as it is open: the sign that its writer lives."""
    while True:
        neighbour = path.with_name(f"{_stem(path)}.{secrets.token_hex(8)}{_ENDING}")
        # By `os.open`, which gives the mode of a plain `open`; O_EXCL follows no link and takes no file that is there.
        descriptor = os.open(neighbour, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if _lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return neighbour, descriptor
        os.close(descriptor)  # another writer looked at it before it was locked, and took it for a left-over


def _remove_left_over(path: Path) -> None:
    """Removes the neighbours of killed writers."""
    pattern = re.compile(re.escape(_stem(path)) + r"\.[0-9a-f]{16}" + re.escape(_ENDING))
    for name in os.listdir(path.parent):
        if pattern.fullmatch(name):
            is_in_work(path.with_name(name), remove=True)


def is_in_work(path: Path, remove: bool = False) -> bool:
    """Whether a writer that lives has made `path` to write to; if not, and so it is wished, a left-over is removed."""
    if not path.name.endswith(_ENDING):
        return False
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # gone already, or another user's
        return True
    try:
        free = _lock(descriptor)
        if free and remove:
            path.unlink(missing_ok=True)
        return not free
    except OSError:
        return True
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether the lock was free, and is ours now; None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _stem(path: Path) -> str:
    """The name, short enough to take an ending: a file system's names have 255 bytes."""
    return os.fsdecode(os.fsencode(path.name)[:200])


# ---------------------------------------------------------------- JSON


def to_json(content: Any) -> str:
    """JSON with an indent and a line's end; numbers that are not finite are null, as JSON has none."""
    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """`value` with None for every NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """`content` as JSON with its checksum beside it, for programs to read back by `read_sealed`."""
    write_text(path, to_json({**content, _SEAL: _digest(content)}))


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote to `path`.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it holds something else.
    """
    with naming(path):
        data = path.read_bytes()
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: damaged: wanted JSON, found {error}") from error
    if not isinstance(content, dict) or _SEAL not in content:
        raise DamagedFileError(f"{path}: damaged: wanted what this program wrote, found no checksum in it")
    if content.pop(_SEAL) != _digest(content):
        raise DamagedFileError(f"{path}: damaged: its checksum is another one")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(finite(content), sort_keys=True).encode()).hexdigest()
