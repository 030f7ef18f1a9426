"""The schema of impressions: named fields and the embedding tables they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Field:
    """One column of ids: its name and the embedding table it reads. Fields that name one table share it."""

    name: str
    table: str


@dataclass(frozen=True)
class Schema:
    """The inputs of a model (docs/interformer.md, section 1).

    Args:
        tables: number of ids of every embedding table; ids are `0 .. size - 1`.
        dense: names of the dense scalars, in the order of `Batch.dense`. All of them together make one token.
        categorical: the fields of `Batch.categorical`, one token each; the candidate item is one of them.
        sequences: the fields of `Batch.sequences`, the columns of an event.
        candidate: names of the categorical fields that describe the candidate item, for models that compare it with
            the events (DIN, for example), or that read all else once per request (`InterFormerConfig.shared`).
        candidate_dense: names of the dense scalars that describe the candidate item; the others are the request's.

    Raises:
        ValueError: a field reads an unknown table, a table has no ids, a side has no field, or a candidate field is not
            among the fields.
    """

    tables: Mapping[str, int]
    dense: tuple[str, ...]
    categorical: tuple[Field, ...]
    sequences: tuple[Field, ...]
    candidate: tuple[str, ...] = ()
    candidate_dense: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, size in self.tables.items():
            if size < 1:
                raise ValueError(f"Schema: tables[{name!r}] must hold at least one id, found {size}")
        for side in ("categorical", "sequences"):
            fields: tuple[Field, ...] = getattr(self, side)
            if not fields and not (side == "categorical" and self.dense):
                raise ValueError(f"Schema: {side} must name at least one field, found none")
            for field in fields:
                if field.table not in self.tables:
                    expected = f"must read one of {', '.join(self.tables)}"
                    raise ValueError(f"Schema: {side} field {field.name!r} {expected}; found {field.table!r}")
        names = [field.name for field in self.categorical]
        for name in self.candidate:
            if name not in names:
                raise ValueError(f"Schema: candidate must name fields among {', '.join(names)}; found {name!r}")
        for name in self.candidate_dense:
            if name not in self.dense:
                wanted = f"dense scalars among {', '.join(self.dense) or 'none'}"
                raise ValueError(f"Schema: candidate_dense must name {wanted}; found {name!r}")

    @property
    def num_tokens(self) -> int:
        """`n`, the number of non-sequence tokens of an impression."""
        return len(self.categorical) + bool(self.dense)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON and checkpoints."""
        return {
            "tables": dict(self.tables),
            "dense": list(self.dense),
            "categorical": [[field.name, field.table] for field in self.categorical],
            "sequences": [[field.name, field.table] for field in self.sequences],
            "candidate": list(self.candidate),
            "candidate_dense": list(self.candidate_dense),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Schema:
        """The inverse of `to_dict`."""
        return cls(
            tables=dict(plain["tables"]),
            dense=tuple(plain["dense"]),
            categorical=tuple(Field(*pair) for pair in plain["categorical"]),
            sequences=tuple(Field(*pair) for pair in plain["sequences"]),
            candidate=tuple(plain["candidate"]),
            candidate_dense=tuple(plain.get("candidate_dense", ())),
        )
