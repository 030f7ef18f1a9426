"""Rows shared out by their cost, so that no process of a step waits long for another."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

# A row of `L` events costs `L^2 + TOKEN_COST * L + ROW_COST`, in pairs of tokens that meet in attention: a token's
# linear maps cost as much as so many pairs, and a row's static side as much as so many tokens' maps.
TOKEN_COST, ROW_COST = 1000, 20_000


def cost_of(lengths: Tensor, impressions: Tensor | int = 1) -> Tensor:
    """The cost of rows of these lengths, float64, read by so many impressions each."""
    length = lengths.double()
    return length * length + TOKEN_COST * length + ROW_COST * impressions


def balanced(costs: Tensor, parts: int) -> list[Tensor]:
    """The items of each part, ascending: the dearest first, each goes to the part that is cheapest so far.

    The most expensive part costs at most `4/3` of what the best division would, and rarely more than the mean plus a
    cheap item.
    """
    totals = [(0.0, part) for part in range(parts)]
    owner = torch.empty(len(costs), dtype=torch.int64)
    for item in torch.argsort(costs, descending=True, stable=True).tolist():
        total, part = heapq.heappop(totals)
        owner[item] = part
        heapq.heappush(totals, (total + float(costs[item]), part))
    return [(owner == part).nonzero().squeeze(1) for part in range(parts)]
