"""The targets of this package by kind of shape: ratios to its best peer, and shares of the machine's GEMM rate.

The targets are for AVX-512 and 2 threads. On AVX2 the promise is `FLOOR` times the best peer, everywhere. They are held
against the best peer at its best number of threads, and only where the machine was quiet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from interformer_bench.peers.peer import FOLDS, PADDED_BMM, PROJECTS

ISAS = ("avx512", "avx512_bf16")
THREADS = 2
FLOOR = 0.95
# The largest ratio of backward to forward.
BACKWARD_OVER_FORWARD = 2.8
# The largest peak memory beyond inputs and outputs, as a share of padded SDPA's where a tenth of its places is tokens.
MEMORY = 0.10


@dataclass(frozen=True)
class Target:
    """Minimum ratios by group of peers (`""`: all peers), and the minimum share of the GEMM rate."""

    forward: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, float] = field(default_factory=dict)
    gemm: float | None = None

    def ratios(self, direction: str) -> Mapping[str, float]:
        """The ratios of one pass."""
        return self.forward if direction == "forward" else self.training


def _best(forward: float, training: float, gemm: float | None = None) -> Target:
    return Target({"": forward}, {"": training}, gemm)


# Kinds with a target for each dtype: attention inside rows.
TARGETS: dict[tuple[str, str], Target] = {
    ("long rows", "float32"): _best(1.25, 1.3, 0.95),
    ("middle rows", "float32"): _best(2.2, 2.2, 0.80),
    ("short rows", "float32"): _best(7.0, 8.0, 0.40),
    ("long rows", "bfloat16"): _best(2.2, 1.8, 0.70),
    ("middle rows", "bfloat16"): _best(3.0, 2.5),
    ("short rows", "bfloat16"): _best(9.0, 8.0),
}
_ANY_DTYPE = {
    "folded": Target({PROJECTS: 8.0, FOLDS: 4.5}, {PROJECTS: 6.0, FOLDS: 3.0}),
    "pooled": _best(3.0, 3.0),
    "row weights": Target({PADDED_BMM: 1.5}, {PADDED_BMM: 1.5}),
    "full": _best(1.0, 1.0),
    "none": Target(),
}
KINDS = (*dict.fromkeys(kind for kind, _ in TARGETS), *_ANY_DTYPE)


def target(kind: str, dtype: str) -> Target:
    """The target of a kind of shape; an empty one where nothing is promised for the dtype."""
    return _ANY_DTYPE[kind] if kind in _ANY_DTYPE else TARGETS.get((kind, dtype), Target())
