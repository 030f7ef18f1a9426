"""The batches on which whole models are measured, and the size of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from interformer import InterFormerConfig, Schema
from interformer.batch import Batch
from interformer.schema import Field
from interformer.testing import random_batch
from interformer_bench.shapes import LengthDistribution, log_normal

TRAINING, INFERENCE = "training step", "inference"
# The default form at the paper's sizes (E 64, H 4, three layers), for the longest histories of any distribution.
CONFIG = InterFormerConfig(max_history=4096)
_ITEM, _CATEGORY = Field("item", "item"), Field("category", "category")
# Two scalars, three categorical fields, three fields of an event; tables of a public data set's size.
SCHEMA = Schema(
    tables={"user": 100_000, "item": 50_000, "category": 1_000, "opinion": 2},
    dense=("age", "price"),
    categorical=(Field("user", "user"), _ITEM, _CATEGORY),
    sequences=(_ITEM, _CATEGORY, Field("opinion", "opinion")),
    candidate=("item", "category"),
    candidate_dense=("price",),
)


# Long histories: 95 % of them are shorter than 1384 events.
_LONG = LengthDistribution("log-normal, mean 513", "synthetic", log_normal(513, 4096, sigma=0.796))


@dataclass(frozen=True)
class Case:
    """One batch and the pass that is measured on it.

    Attributes:
        ratio: how many times as fast as the best padded model it should be; None without a target.
        memory: the largest acceptable share of the padded model's peak memory; None without a target.
    """

    distribution: LengthDistribution
    rows: int
    direction: str
    ratio: float | None = None
    memory: float | None = None

    @property
    def name(self) -> str:
        """The name of the case for `--case`."""
        return f"{self.distribution.name} x {self.rows}, {self.direction}"

    def lengths(self) -> tuple[int, ...]:
        """Events of each row; a single row has the median length."""
        if self.rows == 1:
            return (int(self.distribution.quantile(torch.tensor([0.5], dtype=torch.float64))),)
        return self.distribution.lengths(self.rows)

    def batch(self) -> Batch:
        """A batch with random ids and labels."""
        return random_batch(SCHEMA, self.lengths())


def cases(distributions: Mapping[str, LengthDistribution]) -> list[Case]:
    """All cases, training first."""
    real, short, paper = (distributions[name] for name in ("movielens", "beauty", "all 104"))
    return [
        *(Case(real, rows, TRAINING, 2.5, 0.5) for rows in (32, 256, 2048)),
        Case(short, 1024, TRAINING, 2.5, 0.5),
        Case(paper, 2048, TRAINING, 1.8),
        Case(_LONG, 64, TRAINING),
        Case(real, 1, INFERENCE, 1.2),
        *(Case(real, rows, INFERENCE, 2.5) for rows in (32, 2048)),
        *(Case(paper, rows, INFERENCE) for rows in (1, 32, 2048)),
        *(Case(_LONG, rows, INFERENCE) for rows in (1, 32)),
    ]
