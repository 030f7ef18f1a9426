"""Reading of YAML files as plain values."""

from __future__ import annotations

from typing import Any

import yaml


def read_yaml(path: Any, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The plain values in the file `path`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not YAML; the message is one line with the position.
    """
    data = path.read_bytes()
    try:
        return yaml.load(data.decode("utf-8"), loader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except Exception as error:  # PyYAML also raises the errors of its constructors for dates, numbers and keys.
        mark = getattr(error, "problem_mark", None)
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(position + " ".join(str(getattr(error, "problem", None) or error).split())[:200]) from error
