"""Masks, biases and dropout of the reference against loops over single pairs, written from docs/ops.md."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

import interformer_kernels as ik
from interformer_kernels.reference_scores import Dropout, Masks, Sizes, philox, visible_keys


def sees(i: int, j: int, row: tuple[int, int, int], masks: Masks) -> bool:
    """Whether query `i` sees key `j` in a row of `(queries, keys, targets)`."""
    queries, keys, targets = row
    history, is_target = keys - targets, i >= queries - targets
    if not (i < queries and j < keys):
        return False
    if j >= history:  # a target, which sees itself and is seen by nobody else
        return is_target and j - history == i - (queries - targets)
    p, n = (history if is_target else i + keys - queries), masks.num_prefix
    in_prefix = p < n if masks.prefix == "index" else i < n
    if in_prefix and not is_target and masks.prefix != "keys":
        return True
    if j < n and masks.prefix == "full":
        return True
    place_p, place_j = (max(t - n + 1, 0) if masks.prefix == "index" else t for t in (p, j))
    if masks.causal and place_j > place_p:
        return False
    if j < n and masks.prefix == "keys":
        return True
    if masks.full_tail and i >= queries - targets - masks.full_tail:
        return True
    left, right = masks.window
    return (left < 0 or place_j >= place_p - left) and (right < 0 or place_j <= place_p + right)


def test_masks_are_those_of_single_pairs() -> None:
    draw = random.Random(0)
    windows = [(-1, -1), (2, 0), (0, 0), (3, -1), (-1, 1), (1, 2)]
    kinds = itertools.product((False, True), windows, (0, 1, 3), ("full", "keys", "index"), (0, 2))
    for causal, window, num_prefix, prefix, full_tail in kinds:
        masks = Masks(causal, window, num_prefix, prefix, full_tail)
        sides = [(draw.randrange(9), draw.randrange(9)) for _ in range(6)]
        rows = [(queries, keys, draw.randint(0, min(queries, keys))) for queries, keys in sides]
        sizes = Sizes(*(torch.tensor(column) for column in zip(*rows, strict=True)))
        found = visible_keys(sizes, (9, 9), masks)
        wanted = [[[sees(i, j, row, masks) for j in range(9)] for i in range(9)] for row in rows]
        assert torch.equal(found, torch.tensor(wanted)), masks


def test_philox_gives_the_published_words() -> None:
    """Known answers of Random123 for Philox4x32 of 7 rounds."""
    answers = {
        0: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
        0xFFFFFFFF: (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    }
    for word, wanted in answers.items():
        x = torch.tensor(word)
        assert tuple(map(int, philox((x, x, x, x), (x, x)))) == wanted


def _factor(seed: int, p: float, n: int, head: int, j: int) -> float:
    """The factor of one weight, in plain Python."""
    c = [j // 4, head, n & 0xFFFFFFFF, n >> 32]
    k = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return 0.0 if c[j % 4] < math.floor(p * 2**32) else 1 / (1 - p)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 123456789012345])
def test_dropout_is_replayed_in_plain_python(seed: int) -> None:
    queries, keys = torch.tensor([[0, 7], [2**32 + 5, 2**33 - 1]]), torch.arange(3, 12)
    found = Dropout(0.3, torch.tensor(seed)).factors(queries, keys, 3)
    for b, i, head, at in itertools.product(range(2), range(2), range(3), range(9)):
        wanted = _factor(seed, 0.3, int(queries[b, i]), head, int(keys[at]))
        assert float(found[b, i, head, at]) == pytest.approx(wanted, rel=1e-15)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate_and_no_pattern(p: float) -> None:
    """The rate, and the correlation of neighbours in each direction, lie within five standard deviations."""
    kept = Dropout(p, torch.tensor(17)).factors(torch.arange(64 * 32).view(64, 32), torch.arange(48), 8) > 0
    x = (kept.double() - (1 - p)) / math.sqrt(p * (1 - p))
    assert abs(x.mean()) < 5 / math.sqrt(x.numel())
    for axis in range(x.dim()):
        here, next_one = x.narrow(axis, 0, x.shape[axis] - 1), x.narrow(axis, 1, x.shape[axis] - 1)
        assert abs((here * next_one).mean()) < 5 / math.sqrt(here.numel()), axis


def test_the_mean_of_many_seeds_is_no_dropout() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, 2, 4) for _ in range(3))
    offsets = torch.tensor([0, 3, 7])
    plain = ik.jagged_attention(q, k, v, offsets)
    runs = torch.stack(
        [ik.jagged_attention(q, k, v, offsets, dropout_p=0.5, dropout_seed=seed) for seed in range(2000)]
    )
    error = (runs.mean(0) - plain) / (runs.std(0) / math.sqrt(len(runs)))
    assert error.abs().max() < 5
