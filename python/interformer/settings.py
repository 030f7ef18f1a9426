"""Command-line options made from the dataclasses that hold settings, so that no setting is listed twice."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def add_options(
    parser: argparse.ArgumentParser, title: str, presets: dict[str, object], skip: tuple[str, ...] = ()
) -> None:
    """One option `--name-of-field` for each field of a settings dataclass, but those in `skip`.

    `presets` are instances of that dataclass by the case in which their values hold; what the user does not say is left
    out of the namespace, so that `read_options` can take the preset of the case at hand.
    """
    group = parser.add_argument_group(title)
    some = next(iter(presets.values()))
    kinds = typing.get_type_hints(type(some))
    for field in dataclasses.fields(some):  # type: ignore[arg-type]
        if field.name in skip:
            continue
        shown = {case: _show(getattr(preset, field.name)) for case, preset in presets.items()}
        defaults = shown if len(set(shown.values())) > 1 else {"": next(iter(shown.values()))}
        text = ", ".join(f"{case} {value}".strip() for case, value in defaults.items())
        option = "--" + field.name.replace("_", "-")
        parse, metavar = _parser_of(kinds[field.name])
        group.add_argument(option, type=parse, default=argparse.SUPPRESS, metavar=metavar, help=f"(default: {text})")


def _show(value: object) -> str:
    if value is None:
        return "the fastest"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (",".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def read_options(options: argparse.Namespace, preset: Settings, skip: tuple[str, ...] = ()) -> Settings:
    """`preset` with what the options say of fields other than those in `skip`."""
    names = [field.name for field in dataclasses.fields(preset) if field.name not in skip]  # type: ignore[arg-type]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return dataclasses.replace(preset, **given)  # type: ignore[type-var]


def _parser_of(kind: Any) -> tuple[Callable[[str], Any], str]:
    if kind is bool:
        return _yes_or_no, "yes|no"
    if kind is int:
        return int, "INT"
    if kind is float:
        return float, "FLOAT"
    if kind == tuple[int, ...]:
        return _whole_numbers, "INT,INT,..."
    if kind == tuple[str, ...]:
        return _names, "NAME,NAME,..."
    return str, "NAME"


def _yes_or_no(text: str) -> bool:
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"wanted yes or no, found {text[:40]!r}")
    return text == "yes"


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"wanted whole numbers with commas between, found {text[:40]!r}") from error
