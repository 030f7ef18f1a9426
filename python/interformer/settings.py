"""Command-line options generated from the dataclasses of settings, so that no setting is listed twice."""

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
    """Add an option `--name-of-field` for each field of a settings dataclass, except those in `skip`.

    `presets` are instances of that dataclass, by the case in which they are the defaults. An option that is not given
    is left out of the namespace, so that `read_options` can use the preset of the actual case.
    """
    group = parser.add_argument_group(title)
    any_preset = next(iter(presets.values()))
    kinds = typing.get_type_hints(type(any_preset))
    for field in dataclasses.fields(any_preset):  # type: ignore[arg-type]
        if field.name in skip:
            continue
        texts = {case: _show(getattr(preset, field.name)) for case, preset in presets.items()}
        defaults = texts if len(set(texts.values())) > 1 else {"": next(iter(texts.values()))}
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
    """`preset` with the given options, except for fields in `skip`."""
    names = [field.name for field in dataclasses.fields(preset) if field.name not in skip]  # type: ignore[arg-type]
    values = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return dataclasses.replace(preset, **values)  # type: ignore[type-var]


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
