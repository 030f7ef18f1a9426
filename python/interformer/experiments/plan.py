"""Plans of experiments, read from YAML: data, seeds, and variants of a model and its training.

    name: movielens                     # the folder of the results
    data: {reader: movielens, path: ml-100k, max_history: 50}
    seeds: [1, 2, 3, 4, 5]
    reference: interformer              # the variant that the others are compared with, seed by seed
    base:                               # defaults of every variant
      model: {embed_dim: 8}             # fields of InterFormerConfig
      training: {lr: 4.0e-3}            # fields of TrainConfig; the seed comes from `seeds`
      search: {training.lr: [2.0e-3, 4.0e-3]}  # the grid of --tune
    variants:
      interformer: {}
      din: {kind: din, group: baselines, model: {dropout: 0.1}}
      no_pma: {group: pieces, model: {num_seeds: 0}, seeds: [1]}

`kind` is one of `interformer.models`, `module:Class` of one's own, or `boosting`.
A variant's fields override those of `base`; its own `seeds` must be among the file's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import yaml

from interformer import checks
from interformer.checks import short_repr
from interformer.config import InterFormerConfig
from interformer.models import find_model
from interformer.train import TrainConfig
from interformer.yaml_files import read_yaml

Settings = TypeVar("Settings", InterFormerConfig, TrainConfig)
KINDS: dict[Any, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
SETTING_KEYS = {"model", "training", "search"}
BOOSTING = "boosting"  # the kind of `interformer.boosting`, which is no module


class PlanError(ValueError):
    """An invalid plan: `FILE: key: wanted ..., found ...`."""


@dataclass(frozen=True)
class Variant:
    """One model with its training, for each of `seeds`; `search` is the grid of `--tune`, by `section.field`."""

    name: str
    kind: str
    group: str | None
    model: InterFormerConfig
    training: TrainConfig
    seeds: tuple[int, ...]
    search: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Plan:
    """An experiment. `data` holds `reader`, `path` if the reader has one, and the reader's options."""

    name: str
    data: Mapping[str, Any]
    reference: str
    variants: tuple[Variant, ...]

    def choose(self, names: tuple[str, ...], seeds: tuple[int, ...]) -> tuple[Variant, ...]:
        """The variants `names` (all if empty), restricted to `seeds` (no restriction if empty)."""
        chosen = [variant for variant in self.variants if not names or variant.name in names]
        if seeds:
            chosen = [replace(v, seeds=tuple(seed for seed in v.seeds if seed in seeds)) for v in chosen]
        return tuple(chosen)


def find(name: str) -> Path:
    """The file `name`, or the shipped file of that name, with or without its extension."""
    if Path(name).exists():
        return Path(name)
    shipped = {path.name: path for path in Path(str(resources.files("interformer") / "configs")).glob("*.yaml")}
    path = shipped.get(name, shipped.get(f"{name}.yaml"))
    if path is None:
        raise FileNotFoundError(f"{name}: wanted a file or one of {', '.join(sorted(shipped))}; found neither")
    return path


def read(path: Path) -> Plan:
    """The experiment in the file `path`.

    Raises:
        PlanError: the file is invalid; the message names the file and the key.
    """
    plain = _load(path)
    top = _Section(path, "", plain, {"name", "data", "seeds", "base", "variants", "reference"})
    name = top.text("name")
    if requirement := checks.why_no_file_name(name):
        raise top.error("name", requirement, name)
    data = top.section("data", None).plain
    if not isinstance(data.get("reader"), str):
        raise top.error("data.reader", "the name of a reader", data.get("reader"))
    seeds = top.seeds()
    base = _Settings(InterFormerConfig(), TrainConfig(), {}).overridden_by(top.section("base", SETTING_KEYS))
    variants = top.section("variants", None)
    if not variants.plain:
        raise top.error("variants", "at least one", variants.plain)
    parsed = tuple(_variant(base, variants, name, seeds) for name in variants.plain)
    reference = top.text("reference", parsed[0].name)
    if reference not in variants.plain:
        raise top.error("reference", f"one of {', '.join(variants.plain)}", reference)
    return Plan(name, data, reference, parsed)


def trials(variant: Variant) -> Iterator[tuple[dict[str, Any], Variant]]:
    """The trials of `--tune`: each point of the variant's grid, and the variant with these settings."""
    for values in itertools.product(*variant.search.values()):
        point = dict(zip(variant.search, values, strict=True))
        changed = variant
        for key, value in point.items():
            section, field = key.split(".")
            changed = replace(changed, **{section: replace(getattr(changed, section), **{field: value})})
        yield point, changed


# ---------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as in YAML 1.2, and a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"found {key.value!r} a second time", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        plain = read_yaml(path, _Loader)
    except ValueError as error:
        raise PlanError(f"{path}: {error}") from error
    if not isinstance(plain, dict):
        raise PlanError(f"{path}: wanted a mapping with name, data, seeds and variants, found {short_repr(plain)}")
    return plain


class _Section:
    """A mapping in the file and its key path `where`; keys outside `known` are an error."""

    def __init__(self, path: Path, where: str, plain: Any, known: set[str] | None) -> None:
        self.path, self.where = path, where
        plain = {} if plain is None else plain
        if not isinstance(plain, dict):
            raise PlanError(f"{path}: {where}: wanted a mapping, found {short_repr(plain)}")
        self.plain: dict[str, Any] = plain
        for key in plain:
            if not isinstance(key, str) or (known is not None and key not in known):
                expected = f"one of {', '.join(sorted(known))}" if known else "a name"
                raise PlanError(f"{path}: {self.key(str(key))}: the key must be {expected}; found {short_repr(key)}")

    def key(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def error(self, name: str, expected: str, found: object) -> PlanError:
        return PlanError(f"{self.path}: {self.key(name)}: wanted {expected}; found {short_repr(found)}")

    def section(self, name: str, known: set[str] | None) -> _Section:
        return _Section(self.path, self.key(name), self.plain.get(name), known)

    def text(self, name: str, default: str | None = None) -> str:
        value = self.plain.get(name, default)
        if not isinstance(value, str):
            raise self.error(name, "a name", value)
        return value

    def seeds(self, among: tuple[int, ...] = ()) -> tuple[int, ...]:
        value = self.plain.get("seeds", list(among))
        whole = isinstance(value, list) and all(type(seed) is int for seed in value)
        if not whole or not value or len(set(value)) < len(value):
            raise self.error("seeds", "different whole numbers, at least one", value)
        if not all(0 <= seed <= checks.SEEDS for seed in value):
            raise self.error("seeds", f"seeds of 0 to {checks.SEEDS}", value)
        if among and not set(value) <= set(among):
            raise self.error("seeds", f"some of {', '.join(map(str, among))}", value)
        return tuple(value)

    def settings(self, preset: Settings) -> Settings:
        """`preset` with this section's fields; errors name the file and the key."""
        known = {field.name for field in fields(preset)}
        if isinstance(preset, TrainConfig):
            known.discard("seed")
        kinds, values = get_type_hints(type(preset)), {}
        for name, value in _Section(self.path, self.where, self.plain, known).plain.items():
            allowed = KINDS.get(kinds[name])
            if allowed and type(value) not in allowed:
                raise self.error(name, f"a value of kind {kinds[name].__name__}", value)
            if kinds[name] is float:
                if not checks.finite_in_float32(value):
                    raise self.error(name, "a number that is finite in float32", value)
                value = float(value)
            values[name] = tuple(value) if isinstance(value, list) else value
        try:
            return replace(preset, **values)
        except (TypeError, ValueError) as error:
            raise PlanError(f"{self.path}: {self.where}: {error}") from error


class _Settings(NamedTuple):
    """Settings of a model and its training, with their search grid."""

    model: InterFormerConfig
    training: TrainConfig
    search: Mapping[str, tuple[Any, ...]]

    def overridden_by(self, section: _Section) -> _Settings:
        """These settings with the section's `model`, `training` and `search` applied."""
        model = section.section("model", None).settings(self.model)
        training = section.section("training", None).settings(self.training)
        search = section.section("search", None)
        values = {key: _search_values(search, key, model, training) for key in search.plain}
        return _Settings(model, training, {**self.search, **values})


def _variant(base: _Settings, variants: _Section, name: str, seeds: tuple[int, ...]) -> Variant:
    section = variants.section(name, {*SETTING_KEYS, "kind", "group", "seeds"})
    if not re.fullmatch(r"[\w.]+", name) or checks.why_no_file_name(name):
        raise variants.error(name, "a name of letters, digits, . and _", name)
    kind = section.text("kind", "interformer")
    if kind != BOOSTING:
        try:
            find_model(kind)
        except (ImportError, ValueError) as error:
            raise PlanError(f"{section.path}: {section.key('kind')}: wanted {BOOSTING} or a model: {error}") from error
    group = section.text("group") if "group" in section.plain else None
    if group is not None and (requirement := checks.why_no_file_name(group)):  # Plots are named after the group.
        raise section.error("group", requirement, group)
    settings = base.overridden_by(section)
    return Variant(name, kind, group, settings.model, settings.training, section.seeds(seeds), settings.search)


def _search_values(search: _Section, key: str, model: InterFormerConfig, training: TrainConfig) -> tuple[Any, ...]:
    """The values of one entry of `search`, each checked as a setting."""
    values, (section, _, field) = search.plain[key], key.partition(".")
    if section not in ("model", "training") or not field:
        raise search.error(key, "model.FIELD or training.FIELD", key)
    if not isinstance(values, list) or not values:
        raise search.error(key, "a list of values", values)
    preset: Any = model if section == "model" else training
    checked = [_Section(search.path, search.where, {field: value}, None).settings(preset) for value in values]
    return tuple(getattr(settings, field) for settings in checked)
