"""Command-line options made from the dataclasses that hold settings, so that no setting is listed twice."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def add_options(parser: argparse.ArgumentParser, defaults: object, title: str, skip: tuple[str, ...] = ()) -> None:
    """One option `--name-of-field` for each field of the dataclass instance `defaults`, but those in `skip`."""
    group = parser.add_argument_group(title)
    kinds = typing.get_type_hints(type(defaults))
    for field in dataclasses.fields(defaults):  # type: ignore[arg-type]
        if field.name in skip:
            continue
        value = getattr(defaults, field.name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        option = "--" + field.name.replace("_", "-")
        parse, metavar = _parser_of(kinds[field.name])
        group.add_argument(option, type=parse, default=value, metavar=metavar, help=f"(default: {shown})")


def read_options(options: argparse.Namespace, defaults: Settings) -> Settings:
    """`defaults` with what the options say."""
    names = [field.name for field in dataclasses.fields(defaults)]  # type: ignore[arg-type]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return dataclasses.replace(defaults, **given)  # type: ignore[type-var]


def _parser_of(kind: Any) -> tuple[Callable[[str], Any], str]:
    if kind is bool:
        return _yes_or_no, "yes|no"
    if kind is int:
        return int, "INT"
    if kind is float:
        return float, "FLOAT"
    if kind == tuple[int, ...]:
        return _whole_numbers, "INT,INT,..."
    return str, "NAME"


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"wanted yes or no, found {text!r}")
    return text == "yes"


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"wanted whole numbers with commas between, found {text!r}") from error
