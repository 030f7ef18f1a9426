"""Named distributions of row lengths: real histories where their files are available, fitted ones, synthetic ones.

A distribution is a quantile function; a batch draws its lengths at random quantiles from a seed. The files of real
lengths are JSON lists of integers in a data directory. They are optional: the fitted distributions have their
quantiles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Directory of length files by default: beside a source checkout.
DEFAULT_DATA = Path("../shared/data")
_LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)
# Real histories: file, and the lengths at the quantiles of `_LEVELS`.
_REAL = {
    "movielens": ("ml100k_prefix_before_each_rating.json", (0, 10, 26, 70, 145, 233, 451, 672, 736)),
    "beauty": ("5core_beauty.json", (5, 5, 5, 6, 9, 14, 43, 97, 204)),
    "grocery": ("amazon_grocery_train.json", (3, 3, 3, 5, 9, 17, 54, 108, 202)),
    "diginetica": ("diginetica_sessions.json", (1, 1, 1, 3, 5, 9, 20, 39, 54)),
    "completejourney": ("completejourney_history_at_visit.json", (0, 48, 143, 367, 757, 1268, 2600, 3389, 4053)),
}
REAL = ("movielens", "beauty", "grocery", "diginetica")  # of which GPU shapes are made

Quantile = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LengthDistribution:
    """A distribution of row lengths.

    Attributes:
        name: its name in reports and options.
        source: "real" (from a file), "fitted" (to a file that is not available) or "synthetic".
        quantile: maps levels in [0, 1], float64, to lengths (`lengths` rounds them down).
    """

    name: str
    source: str
    quantile: Quantile

    def lengths(self, rows: int, seed: int = 0) -> tuple[int, ...]:
        """The lengths of a batch of `rows` rows."""
        levels = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return tuple(self.quantile(levels).floor().long().tolist())


def _observed(lengths: Sequence[int]) -> Quantile:
    """The lengths themselves, all equally likely."""
    ordered = torch.tensor(sorted(lengths), dtype=torch.float64)
    return lambda level: ordered[(level * len(ordered)).long().clamp(max=len(ordered) - 1)]


def _fitted(knots: Sequence[int]) -> Quantile:
    """An interpolation of the known quantiles, linear in log(1 + length)."""
    levels, heights = torch.tensor(_LEVELS, dtype=torch.float64), torch.tensor(knots, dtype=torch.float64).log1p()

    def quantile(level: Tensor) -> Tensor:
        right = torch.bucketize(level, levels).clamp(1, len(levels) - 1)
        share = (level - levels[right - 1]) / (levels[right] - levels[right - 1])
        return torch.lerp(heights[right - 1], heights[right], share).expm1() + 1e-6  # `lengths` rounds down

    return quantile


def log_normal(mean: float, longest: int, sigma: float = 1.0) -> Quantile:
    """Log-normal, clipped to [1, longest]; the median is chosen so that the clipped mean is `mean`."""

    def at(median: float, level: Tensor) -> Tensor:
        return (median * torch.exp(sigma * torch.special.ndtri(level))).clamp(1, longest)

    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    low, high = 1.0, float(longest)
    for _ in range(50):
        median = (low + high) / 2
        low, high = (median, high) if at(median, grid).mean() < mean else (low, median)
    return lambda level: at(low, level)


def equal(length: int) -> LengthDistribution:
    """Rows of one length."""
    return LengthDistribution(f"all {length}", "synthetic", lambda level: torch.full_like(level, length))


def filled(fill: float, longest: int = 512) -> LengthDistribution:
    """Lengths `longest * u^(1/fill - 1)`: padded to the longest, a fraction `fill` of the batch is tokens."""
    return LengthDistribution(f"fill {fill}", "synthetic", lambda level: (longest * level ** (1 / fill - 1)).ceil())


def _synthetic() -> list[LengthDistribution]:
    quantiles: dict[str, Quantile] = {
        "uniform 1..50": lambda level: (level * 50 + 1).clamp(max=50),
        "log-normal, mean 100": log_normal(100, 1000),
        "log-normal, mean 500": log_normal(500, 2048),
    }
    # 104 is the length of the InterFormer paper's sequences.
    constant_or_filled = *(equal(length) for length in (1024, 104)), *(filled(share) for share in (0.1, 0.5, 1.0))
    return [
        *(LengthDistribution(name, "synthetic", quantile) for name, quantile in quantiles.items()),
        *constant_or_filled,
    ]


def length_distributions(data: str | Path | None = None) -> dict[str, LengthDistribution]:
    """All distributions by name. The length files are in `data`, in its `lengths/`, or in a `lengths/` beside it."""
    real = {}
    for name, (file, knots) in _REAL.items():
        path = _find(file, DEFAULT_DATA if data is None else Path(data))
        quantile = _fitted(knots) if path is None else _observed(_read_lengths(path))
        real[name] = LengthDistribution(name, "fitted" if path is None else "real", quantile)
    return real | {synthetic.name: synthetic for synthetic in _synthetic()}


def _read_lengths(path: Path) -> list[int]:
    try:
        lengths = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: wanted lengths as JSON, found {error}") from error
    if not isinstance(lengths, list) or not lengths or not all(type(x) is int and 0 <= x < 2**31 for x in lengths):
        raise ValueError(f"{path}: wanted a list of lengths, found something else")
    return lengths


def _find(file: str, data: Path) -> Path | None:
    candidates = (data / file, data / "lengths" / file, data.parent / "lengths" / file)
    return next((path for path in candidates if path.is_file()), None)
