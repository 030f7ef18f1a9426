"""Atomic writes of files, and JSON files with a checksum.

A write goes to a temporary file beside the target, with a random name. It is flushed to disk and then renamed over the
target, so readers see the old file or the new one, also after a kill or a full disk.
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
except ImportError:  # Without POSIX locks, temporary files of killed writers are not removed.
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".interformer.tmp"
_SEAL = "sha256"


class DamagedFileError(ValueError):
    """A file whose content is not what was written; the message is one line and names the file."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an `OSError` raised inside (a full disk, for example) that names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that replaces `path` at the end, or is removed if an exception is raised.

    Safe for threads and processes: with several writers, `path` is always one writer's whole file, in the end the last
    one's. The mode is that of the file it replaces, or the default of `open`. If `path` is a symbolic link, the link is
    replaced and its target is not changed. A special file (`/dev/stdout`, a pipe) is written to directly. Temporary
    files left by killed writers of `path` are removed.

    Raises:
        OSError: with the file name `path` (a full disk, no permission, a directory).
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
        _remove_leftovers(path)
        temporary, descriptor = _create_locked(path)
        try:
            if mode is not None and not path.is_symlink():
                os.fchmod(descriptor, stat.S_IMODE(mode))
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)  # It is still locked, so no other process removes it as a leftover.
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append `record` to `path` as one line of JSON, by one write: lines of several processes do not mix, and earlier
    lines survive a kill of the writer.
    """
    line = json.dumps(finite(record), allow_nan=False) + "\n"
    with naming(path), open(path, "ab", buffering=0) as file:
        file.write(line.encode())


def check_writable(path: Path) -> None:
    """Raise the `OSError` that writing `path` would raise; to be called before a long computation."""
    mode = _mode_of(path)
    if mode is None or stat.S_ISREG(mode):
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary, descriptor = _create_locked(path)
            os.close(descriptor)
            temporary.unlink()
    elif stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "wanted a file, found a directory", str(path))


def _mode_of(path: Path) -> int | None:
    """The mode of the file behind `path`; None if it does not exist."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _create_locked(path: Path) -> tuple[Path, int]:
    """A new temporary file beside `path`, locked while it is open: the lock shows that its writer is alive."""
    while True:
        temporary = path.with_name(f"{_stem(path)}.{secrets.token_hex(8)}{_SUFFIX}")
        # `os.open` gives it the default mode of `open`; O_EXCL follows no link and opens no existing file.
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if _lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # Another writer saw it before it was locked, and removed it as a leftover.


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed writers of `path`."""
    pattern = re.compile(re.escape(_stem(path)) + r"\.[0-9a-f]{16}" + re.escape(_SUFFIX))
    for name in os.listdir(path.parent):
        if pattern.fullmatch(name):
            is_being_written(path.with_name(name), remove=True)


def is_being_written(path: Path, remove: bool = False) -> bool:
    """Whether `path` is the temporary file of a living writer; with `remove`, a dead writer's file is removed."""
    if not path.name.endswith(_SUFFIX):
        return False
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # The file is gone, or belongs to another user.
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
    """Whether the lock was acquired; None if the file system has no locks."""
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
    """The file name, cut so that a suffix fits: names have at most 255 bytes."""
    return os.fsdecode(os.fsencode(path.name)[:200])


# ---------------------------------------------------------------- JSON


def to_json(content: Any) -> str:
    """Indented JSON with a final newline; numbers that are not finite become null, since JSON has none."""
    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """`value` with None in place of every NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON with a checksum, to be read by `read_sealed`."""
    write_text(path, to_json({**content, _SEAL: _digest(content)}))


def read_sealed(path: Path) -> dict[str, Any]:
    """The content that `write_sealed` wrote to `path`.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: the file has another content.
    """
    with naming(path):
        data = path.read_bytes()
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: damaged: wanted JSON, found {error}") from error
    if not isinstance(content, dict) or _SEAL not in content:
        raise DamagedFileError(f"{path}: damaged: wanted a file written by this program, found no checksum in it")
    if content.pop(_SEAL) != _digest(content):
        raise DamagedFileError(f"{path}: damaged: its checksum does not match")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(finite(content), sort_keys=True).encode()).hexdigest()
