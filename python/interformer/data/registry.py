"""Registry of the readers, for experiments."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interformer.checks import short_repr
from interformer.data.beauty import read_beauty
from interformer.data.clicks import Splits
from interformer.data.completejourney import read_completejourney
from interformer.data.delimited import read_csv
from interformer.data.movielens import read_movielens
from interformer.data.synthetic import SyntheticLaw, synthesize


def _read_synthetic(**law: Any) -> Splits:
    return synthesize(SyntheticLaw(**law))


READERS: dict[str, Callable[..., Splits]] = {
    "movielens": read_movielens,
    "beauty": read_beauty,
    "completejourney": read_completejourney,
    "csv": read_csv,
    "synthetic": _read_synthetic,
}


def read(reader: str, path: Path | str | None = None, **options: Any) -> Splits:
    """Call the reader called `reader` with `path` and `options`, its keyword arguments.

    `synthetic` has no path; its options are the fields of `SyntheticLaw`. Without a path, `completejourney` reads an
    installed package.

    Raises:
        ValueError: there is no such reader, an option is unknown or missing, or a path is missing or not allowed.
        Exception: the errors of the reader.
    """
    if reader not in READERS:
        raise ValueError(f"reader must be one of {', '.join(READERS)}; found {reader!r}")
    has_path = path is not None if reader == "completejourney" else reader != "synthetic"
    if has_path != (path is not None):
        raise ValueError(f"reader {reader!r}: wanted {'a' if has_path else 'no'} path, found {short_repr(path)}")
    known = _options(reader)
    for name in options:
        if name not in known:
            raise ValueError(f"reader {reader!r}: options must be among {', '.join(known)}; found {short_repr(name)}")
    for name, required in known.items():
        if required and name not in options:
            raise ValueError(f"reader {reader!r}: wanted the option {name!r}; found {', '.join(options) or 'none'}")
    return READERS[reader](*([path] if has_path else []), **options)


def _options(reader: str) -> dict[str, bool]:
    """The options of a reader, and whether they are required."""
    if reader == "synthetic":
        return {field.name: False for field in dataclasses.fields(SyntheticLaw)}
    _, *parameters = inspect.signature(READERS[reader]).parameters.values()
    required = {parameter.name: parameter.default is parameter.empty for parameter in parameters}
    required.pop("progress", None)  # an object, which no configuration file can hold
    return required
