"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A neighbour of `path` to write to: at the end it is flushed to the disk and renamed over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    neighbour = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(neighbour, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(neighbour, path)
    finally:
        neighbour.unlink(missing_ok=True)


def to_json(content: Any) -> str:
    """JSON with an indent and a line's end."""
    return json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def without_nan(value: Any) -> Any:
    """`value` with None for every NaN, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
