"""Embedding of ids and dense scalars as tokens (docs/interformer.md, section 1), the first layer of every model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interformer.batch import Batch
from interformer.config import InterFormerConfig
from interformer.schema import Field, Schema


class Embedding(nn.Module):
    """The batch's fields as tokens. Fields that name one table share it; a table that no field reads is not created.

    `tokens(batch)` is `X [B, n, E]`: one token for all dense scalars together (if there are any), then one for each
    categorical field; `candidate_of(tokens)` selects the candidate's. `events(batch)` is `Sc [T, kE]`, of the `k`
    fields of `config.event_fields`, or all. There is no norm and no bias.

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
            expected = f"one column for each of {', '.join(field.name for field in fields)}"
            raise ValueError(f"InterFormer: batch.{side} must have {expected}; found shape {list(ids.shape)}")
        columns = range(len(fields)) if side == "categorical" else self.columns
        return [self.tables[self.key_of[fields[i].table]](ids[:, i]) for i in columns]

    def tokens(self, batch: Batch) -> Tensor:
        tokens = self._look_up("categorical", batch.categorical)
        if self.dense is not None:
            tokens.insert(0, self.dense(batch.dense.to(self.dense.weight.dtype)))
        return self.dropout(torch.stack(tokens, 1))

    def events(self, batch: Batch) -> Tensor:
        return self.dropout(torch.cat(self._look_up("sequences", batch.sequences), 1))

    def candidate_of(self, tokens: Tensor) -> Tensor:
        """The candidate's fields among `tokens(batch) [B, n, E]`, concatenated: `[B, cE]`."""
        names = [field.name for field in self.schema.categorical]
        first = self.dense is not None
        return tokens[:, [first + names.index(name) for name in self.schema.candidate]].flatten(1)


def module_key(name: str) -> str:
    """A table's name as a key of `nn.ModuleDict`, which allows no dots, no empty names and no names of its attributes.

    Dots and percent signs are escaped as in URLs, and a percent sign is appended to empty names and names of
    attributes, so that different names have different keys. Other names stay as they are.
    """
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"{key}%" if not key or hasattr(nn.ModuleDict(), key) else key


def _columns(schema: Schema, event_fields: tuple[str, ...]) -> tuple[int, ...]:
    names = [field.name for field in schema.sequences]
    for name in event_fields:
        if name not in names:
            raise ValueError(f"event_fields must be among {', '.join(names)}; found {name!r}")
    return tuple(names.index(name) for name in event_fields) or tuple(range(len(names)))
