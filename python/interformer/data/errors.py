"""The error of readers for an invalid data file."""

from __future__ import annotations

from pathlib import Path


class MalformedFileError(ValueError):
    """An invalid data file; the message begins with `file:line:column`."""

    def __init__(self, path: Path, line: int, column: int, message: str) -> None:
        super().__init__(f"{path}:{line}:{column}: {message}")
        self.path, self.line, self.column = path, line, column
