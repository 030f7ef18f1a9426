"""Plain values from YAML files that people write."""

from __future__ import annotations

from typing import Any

import yaml


def read_yaml(path: Any, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The plain values in the file `path`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML; the message, of one line, says where.
    """
    data = path.read_bytes()
    try:
        return yaml.load(data.decode("utf-8"), loader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except Exception as error:  # PyYAML lets out whatever its constructors meet: of dates, numbers, keys
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(place + " ".join(str(getattr(error, "problem", None) or error).split())[:200]) from error
