r"""Synthetic clicks: seeded, nothing to download, with labels that depend on histories and on their order.

**Events.** A catalogue of items, each in one of `C` categories, with a quality `q_i ~ N(0, 1)`. Each user has a stream
of events (item, category, opinion): the category stays the same (30 %), moves to its successor `c + 1 mod C` (20 %), or
is drawn from the user's four favourite categories (50 %); the item is drawn from the category; the opinion, liked or
disliked, is an independent fair coin.

**Impressions.** Each user has `impressions_per_user`; the history of each is a prefix of the user's stream. Prefix
lengths follow the exponential distribution that fits the history lengths of MovieLens-100k: `floor(Exp(mean 100))`, at
most 736, with the quantiles 10/50/90/99 % = 10/69/230/460 (measured: 10/70/233/451) and 1 % empty histories (measured:
0.9 %). The candidate's category is one of the user's favourites (60 %), the successor of the last event's category
(20 %), or any.

**Label.** Bernoulli of `sigmoid(z)`, where

    z = 0.7 q_i + 4 (share - 0.2) + 1.8 opinion + 1.8 next - 0.4

`share` is the fraction of the history in the candidate's category (it depends on content only); `opinion` is +1 or -1
if the *most recent* event in that category was liked or not, 0 without one, and `next` is 1 if the category is the
successor of the last event's (both depend on order). Without a history only `q_i` can be learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from interformer import checks
from interformer.checks import short_repr
from interformer.data.clicks import Clicks, Splits
from interformer.metrics import auc
from interformer.schema import Field, Schema

MAX_LENGTH = 736  # the longest history of MovieLens-100k
MAX_MEAN = 1e9  # mean length; far below it nearly every history has MAX_LENGTH already
NO_CATEGORY = -1


@dataclass(frozen=True)
class SyntheticLaw:
    """Parameters of the synthetic data. The defaults train in about a minute on two cores."""

    num_users: int = 2500
    impressions_per_user: int = 8
    num_items: int = 120
    num_categories: int = 6
    mean_length: float = 100.0
    max_history: int = MAX_LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (
            ("num_users", 10),
            ("impressions_per_user", 1),
            ("num_categories", 5),
            ("num_items", self.num_categories),
            ("max_history", 1),
        ):
            checks.whole(f"SyntheticLaw: {name}", getattr(self, name), minimum)
        checks.kind("SyntheticLaw: mean_length", self.mean_length, int, float)
        if not 0 < self.mean_length <= MAX_MEAN:
            expected = f"at most {MAX_MEAN:g}" if self.mean_length > 0 else "above 0"
            raise ValueError(f"SyntheticLaw: mean_length must be {expected}, found {short_repr(self.mean_length)}")
        checks.seed("SyntheticLaw: seed", self.seed)


def synthesize(law: SyntheticLaw | None = None) -> Splits:
    """Clicks with the parameters `law`, split by user: 80 % train, 10 % validate, 10 % test.

    `facts["oracle_auc"]` is the test AUC of the true `z`: a model can exceed it only by chance. The same parameters
    give the same bits on every machine with the same torch version.
    """
    law = law or SyntheticLaw()
    g = torch.Generator().manual_seed(law.seed)
    catalogue = torch.randint(law.num_categories, (law.num_items,), generator=g)
    catalogue[: law.num_categories] = torch.arange(law.num_categories)  # no category is empty
    quality = torch.randn(law.num_items, generator=g, dtype=torch.float64)
    lengths = _history_lengths(law, g)
    favourites = torch.rand(law.num_users, law.num_categories, generator=g).argsort(1)[:, :4]
    categories, items, opinions = _streams(law, catalogue, favourites, max(int(lengths.max()), 1), g)
    candidate = _candidates(law, catalogue, favourites, categories, lengths, g)
    z = _logit(law, quality[candidate], catalogue[candidate], categories, opinions, lengths)
    label = torch.rand(z.shape, generator=g, dtype=torch.float64) < z.sigmoid()

    events = torch.stack((items, categories, opinions), -1)  # [users, longest, 3]
    first = (torch.arange(law.num_users) * events.shape[1])[:, None].expand_as(lengths)
    user = torch.arange(law.num_users)[:, None].expand_as(lengths).flatten()
    clicks = Clicks(
        schema=_schema(law),
        dense=torch.log1p(lengths.flatten().float())[:, None] / 5,
        categorical=torch.stack((candidate, catalogue[candidate]), -1).flatten(0, 1),
        events=events.flatten(0, 1),
        first=first.flatten(),
        last=(first + lengths).flatten(),
        label=label.flatten().float(),
        user=user,
    ).latest(law.max_history)
    ends = law.num_users * 8 // 10, law.num_users * 9 // 10
    part = (user >= ends[0]).long() + (user >= ends[1])
    train, valid, test = (clicks.select(part == p) for p in range(3))
    oracle = auc(test.label, z.flatten()[part == 2])
    return Splits("synthetic", train, valid, test, facts={"oracle_auc": oracle})


def _schema(law: SyntheticLaw) -> Schema:
    item, category = Field("item", "item"), Field("category", "category")
    tables = {"item": law.num_items, "category": law.num_categories, "opinion": 2}
    events = (item, category, Field("opinion", "opinion"))
    return Schema(tables, ("history_length",), (item, category), events, candidate=("item", "category"))


def _history_lengths(law: SyntheticLaw, g: torch.Generator) -> Tensor:
    """Lengths `[users, impressions]`, ascending along a user's impressions."""
    uniform = torch.rand(law.num_users, law.impressions_per_user, generator=g, dtype=torch.float64)
    lengths = (-law.mean_length * torch.log1p(-uniform)).long()
    return lengths.clamp(max=MAX_LENGTH).sort(1).values


def _draw_items(category: Tensor, catalogue: Tensor, num_categories: int, g: torch.Generator) -> Tensor:
    """An item of each given category, drawn uniformly."""
    by_category = torch.argsort(catalogue, stable=True)
    size = torch.bincount(catalogue, minlength=num_categories)
    start = size.cumsum(0) - size
    uniform = torch.rand(category.shape, generator=g, dtype=torch.float64)
    return by_category[start[category] + (uniform * size[category]).long()]


def _streams(
    law: SyntheticLaw, catalogue: Tensor, favourites: Tensor, longest: int, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Categories, items and opinions of every user's events, each `[users, longest]`."""
    drawn = favourites.gather(1, torch.randint(4, (law.num_users, longest), generator=g))
    chance = torch.rand(law.num_users, longest, generator=g)
    categories = drawn.clone()
    for t in range(1, longest):
        before = categories[:, t - 1]
        moved = torch.where(chance[:, t] < 0.5, (before + 1) % law.num_categories, drawn[:, t])
        categories[:, t] = torch.where(chance[:, t] < 0.3, before, moved)
    items = _draw_items(categories, catalogue, law.num_categories, g)
    return categories, items, torch.randint(2, categories.shape, generator=g)


def _last_category(categories: Tensor, lengths: Tensor) -> Tensor:
    """Category of the last event of each impression's history `[users, impressions]`; NO_CATEGORY where it is empty."""
    padded = torch.cat((torch.full_like(categories[:, :1], NO_CATEGORY), categories), 1)
    return padded.gather(1, lengths)


def _candidates(
    law: SyntheticLaw, catalogue: Tensor, favourites: Tensor, categories: Tensor, lengths: Tensor, g: torch.Generator
) -> Tensor:
    """Candidate items `[users, impressions]`."""
    favourite = favourites.gather(1, torch.randint(4, lengths.shape, generator=g))
    anything = torch.randint(law.num_categories, lengths.shape, generator=g)
    last = _last_category(categories, lengths)
    successor = torch.where(last == NO_CATEGORY, anything, (last + 1) % law.num_categories)
    chance = torch.rand(lengths.shape, generator=g)
    category = torch.where(chance < 0.6, favourite, torch.where(chance < 0.8, successor, anything))
    return _draw_items(category, catalogue, law.num_categories, g)


def _logit(
    law: SyntheticLaw, quality: Tensor, category: Tensor, categories: Tensor, opinions: Tensor, lengths: Tensor
) -> Tensor:
    """The true `z [users, impressions]` of the module's docstring."""
    share = torch.zeros(lengths.shape, dtype=torch.float64)
    opinion = torch.zeros(lengths.shape, dtype=torch.float64)
    place = torch.arange(categories.shape[1])
    for i in range(lengths.shape[1]):  # One impression per user at a time bounds the memory to [users, longest].
        same_category = (categories == category[:, i : i + 1]) & (place < lengths[:, i : i + 1])
        share[:, i] = same_category.sum(1) / lengths[:, i].clamp(min=1)
        latest = torch.where(same_category, place, -1).amax(1)
        latest_opinion = opinions.gather(1, latest.clamp(min=0)[:, None]).squeeze(1) * 2 - 1
        opinion[:, i] = torch.where(latest >= 0, latest_opinion, 0)
    last = _last_category(categories, lengths)
    is_next = (last != NO_CATEGORY) & (category == (last + 1) % law.num_categories)
    return 0.7 * quality + 4 * (share - 0.2) + 1.8 * opinion + 1.8 * is_next - 0.4
