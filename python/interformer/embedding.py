"""Ids and dense scalars as tokens (docs/interformer.md, section 1); every model begins with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interformer.batch import Batch
from interformer.config import InterFormerConfig
from interformer.schema import Field, Schema


class Embedding(nn.Module):
    """The batch's fields as tokens. Fields of one table share its rows; tables that no field reads are not made.

    `tokens(batch)` is `X [B, n, E]`: one token of all dense scalars together (where there are any), then one a
    categorical field; `candidate_of(tokens)` picks the candidate's. `events(batch)` is `Sc [T, kE]`, the `k` fields of
    `config.event_fields`, or all. No norm, no bias.

    Args:
        with_events: whether the model reads histories.

    Raises:
        ValueError: `config.event_fields` names a field that events do not have.
    """

    def __init__(self, config: InterFormerConfig, schema: Schema, with_events: bool = True) -> None:
        super().__init__()
        self.schema = schema
        self.columns = _columns(schema, config.event_fields) if with_events else ()
        events = [schema.sequences[column] for column in self.columns]
        read = {field.table for field in (*schema.categorical, *events)}
        self.tables = nn.ModuleDict()
        self.key_of = {name: module_key(name) for name in read}
        for name, size in schema.tables.items():
            if name in read:
                self.tables[self.key_of[name]] = table = nn.Embedding(size, config.embed_dim)
                nn.init.normal_(table.weight, std=config.embedding_std)
        self.dense = nn.Linear(len(schema.dense), config.embed_dim, bias=False) if schema.dense else None
        self.dropout = nn.Dropout(config.embedding_dropout)

    def _look_up(self, side: str, ids: Tensor) -> list[Tensor]:
        fields: tuple[Field, ...] = getattr(self.schema, side)
        if ids.dim() != 2 or ids.shape[1] != len(fields):
            wanted = f"batch.{side} must have one column for each of {', '.join(field.name for field in fields)}"
            raise ValueError(f"InterFormer: {wanted}; found shape {list(ids.shape)}")
        columns = range(len(fields)) if side == "categorical" else self.columns
        return [self.tables[self.key_of[fields[i].table]](ids[:, i]) for i in columns]

    def tokens(self, batch: Batch) -> Tensor:
        found = self._look_up("categorical", batch.categorical)
        if self.dense is not None:
            found.insert(0, self.dense(batch.dense.to(self.dense.weight.dtype)))
        return self.dropout(torch.stack(found, 1))

    def events(self, batch: Batch) -> Tensor:
        return self.dropout(torch.cat(self._look_up("sequences", batch.sequences), 1))

    def candidate_of(self, tokens: Tensor) -> Tensor:
        """The candidate's fields among `tokens(batch) [B, n, E]`, side by side: `[B, cE]`."""
        names = [field.name for field in self.schema.categorical]
        first = self.dense is not None
        return tokens[:, [first + names.index(name) for name in self.schema.candidate]].flatten(1)


def module_key(name: str) -> str:
    """The name of a table as a key of `nn.ModuleDict`, which takes no dots, no empty names and none of its attributes.

    Other names stay as they are; of these, dots and percent signs are written as in URLs, and a percent sign ends what
    would be an attribute, so that no two names come to one key.
    """
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"{key}%" if not key or hasattr(nn.ModuleDict(), key) else key


def _columns(schema: Schema, wanted: tuple[str, ...]) -> tuple[int, ...]:
    names = [field.name for field in schema.sequences]
    for name in wanted:
        if name not in names:
            raise ValueError(f"event_fields must be among {', '.join(names)}; found {name!r}")
    return tuple(names.index(name) for name in wanted) or tuple(range(len(names)))
