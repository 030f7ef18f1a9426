"""Requests of The Complete Journey, and candidates that were promoted to them and not bought."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from interformer.data.completejourney.tables import WEEKS, Ints, Promotions, Tables

_TRIES = 64  # rounds of rejection; most requests need a few
_UNIT = 2**32  # of weights, which are whole numbers, so that draws have the same bits everywhere


class Requests(NamedTuple):
    """Visits that bought a promoted product, ordered by store, week and time, and their candidates.

    Attributes:
        line: `[R]`: a line of the visit, for household, store and time.
        part: `[R]`.
        request, product, promotion, bought: `[N]`: of each candidate its request, product, place among the promotions
            and label; those of a request are together, bought ones first.
        short: visits that are left out, because too few other products were promoted to them.
    """

    line: Ints
    part: Ints
    request: Ints
    product: Ints
    promotion: Ints
    bought: NDArray[np.bool_]
    short: int


def make_requests(tables: Tables, parts: Sequence[tuple[int, int]], negatives: int, seed: int) -> Requests:
    """The requests of the weeks `parts`, first and last of each, every positive with so many negatives.

    A negative was promoted in the store and week, and is not in the basket; the negatives of a request differ.
    """
    lines, promotions, product_size = tables.lines, tables.promotions, len(tables.products.id)
    store_week = lines.store * (WEEKS + 1) + lines.week
    part_of_week = np.full(WEEKS + 1, -1)
    for number, (first_week, last_week) in enumerate(parts):
        part_of_week[first_week : last_week + 1] = number
    place = np.searchsorted(promotions.key, store_week * product_size + lines.product)
    keys = np.append(promotions.key, -1)  # behind the last one
    promoted = keys[place] == store_week * product_size + lines.product
    positive = np.flatnonzero(promoted & (part_of_week[lines.week] >= 0))
    positive = positive[np.lexsort([x[positive] for x in (lines.product, lines.basket, lines.time, store_week)])]
    first = np.flatnonzero(np.diff(lines.basket[positive], prepend=-1))
    of_request = np.repeat(np.arange(len(first)), np.diff(np.r_[first, len(positive)]))
    part = part_of_week[lines.week[positive[first]]]
    weights = [
        _weights(promotions, product_size, positive_of_part, store_week, lines.product)
        for positive_of_part in (positive[part[of_request] == number] for number in range(len(parts)))
    ]
    rng, drawn = np.random.default_rng(seed), np.empty((len(positive), negatives), np.int64)
    edges = np.flatnonzero(np.diff(store_week[positive], prepend=-1, append=-1))
    for begin, end in pairwise(edges):
        here = store_week[positive[begin]]
        low, high = np.searchsorted(promotions.key, (here * product_size, (here + 1) * product_size))
        weight = weights[part[of_request[begin]]][promotions.key[low:high] % product_size]
        owner = of_request[begin:end] - of_request[begin]
        drawn[begin:end] = low + _draw(weight, owner, place[positive[begin:end]] - low, negatives, rng)
        drawn[begin:end][drawn[begin:end] < low] = -1
    full = np.bincount(of_request, (drawn < 0).any(1), minlength=len(first)) == 0
    kept, number = full[of_request], np.cumsum(full) - 1
    positive, drawn, of_request = positive[kept], drawn[kept], number[of_request[kept]]
    request = np.r_[of_request, np.repeat(of_request, negatives)]
    places, bought = np.r_[place[positive], drawn.ravel()], np.arange(len(request)) < len(positive)
    together = np.lexsort((~bought, request))
    return Requests(
        line=positive[np.flatnonzero(np.diff(of_request, prepend=-1))],
        part=part[full],
        request=request[together],
        product=promotions.key[places[together]] % product_size,
        promotion=places[together],
        bought=bought[together],
        short=int((~full).sum()),
    )


def _weights(promotions: Promotions, products: int, positive: Ints, store_week: Ints, product: Ints) -> Ints:
    """`positives of a part / chances of a part` of each product, in whole numbers.

    Chances are the positives of all stores and weeks in which the product is promoted. So neither a product's
    popularity, nor how often it is promoted, nor whether training knows it, tells of the label.
    """
    bought = np.bincount(product[positive], minlength=products)
    by_week = np.bincount(store_week[positive], minlength=int(promotions.key.max(initial=0)) // products + 1)
    chances = np.bincount(promotions.key % products, by_week[promotions.key // products], minlength=products)
    return np.where(bought > 0, bought * _UNIT // np.maximum(chances.astype(np.int64), 1), 0)


def _draw(weight: Ints, owner: Ints, bought: Ints, negatives: int, rng: np.random.Generator) -> Ints:
    """`negatives` places for each positive, of one store and week; -1 where there is none left.

    Args:
        weight: of each promoted product.
        owner: the request of each positive.
        bought: the place of each positive, which its request's negatives are not.
    """
    size, cumulative = len(weight), np.cumsum(weight)
    owners = np.repeat(owner, negatives)
    taken = np.unique(owner * size + bought)
    drawn, pending = np.full(len(owners), -1), np.arange(len(owners))
    for _ in range(_TRIES if cumulative[-1] else 0):
        if not len(pending):
            break
        ticket = rng.integers(cumulative[-1], size=len(pending))
        place = np.searchsorted(cumulative, ticket, side="right")
        key = owners[pending] * size + place
        fresh = np.zeros(len(key), bool)
        fresh[np.unique(key, return_index=True)[1]] = True
        fresh &= ~np.isin(key, taken)
        drawn[pending[fresh]] = place[fresh]
        taken, pending = np.union1d(taken, key[fresh]), pending[~fresh]
    for slot in pending:  # requests to which hardly another product was promoted
        left = weight.copy()
        mine = taken[(taken >= owners[slot] * size) & (taken < (owners[slot] + 1) * size)] - owners[slot] * size
        left[mine] = 0
        line = np.cumsum(left)
        if line[-1]:
            drawn[slot] = np.searchsorted(line, rng.integers(line[-1]), side="right")
            taken = np.union1d(taken, [owners[slot] * size + drawn[slot]])
    return drawn.reshape(-1, negatives)
