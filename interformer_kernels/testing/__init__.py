"""Inputs and the error budget, shared by the tests, the benches and `interformer-kernels parity`.

A `Case` names one call of one op; `make_inputs` draws its tensors; `compare` runs it on a backend and holds the output,
the log-sum-exp and every gradient against the float64 truth. The error of a quantity is the root mean square over its
numbers, relative to the truth's; fewer than 1024 numbers are pooled over as many draws as make 1024. Its budget:

    error         <= 2 x (error of the same formula in eager PyTorch at the same dtype) + one rounding unit
    largest error <= 6 x (eager PyTorch's largest) + two rounding units of the largest true value

Nothing here is tuned by hand, and nobody gets a second draw. For float64, whose truth is no finer, eager PyTorch's
float32 error, scaled by the ratio of the two rounding units (`2**-29`), stands in for eager's, three times.
"""

from interformer_kernels.testing.budget import (
    DIFFERENTIABLE,
    NUMBERS,
    Errors,
    Row,
    Run,
    Sums,
    call,
    cast_inputs,
    compare,
    differences,
    evaluate,
    judge,
    measure,
    pooled,
)
from interformer_kernels.testing.case import ALL_EMPTY, MIXED, NO_ROWS, ONE_GIANT, TILE_EDGES, Case
from interformer_kernels.testing.draw import Numbers, offsets_of, rotary_tables
from interformer_kernels.testing.hard import PLANTED, Plant, check_planted, compare_hard, held_tokens, plants
from interformer_kernels.testing.hard_values import HARD_VALUES
from interformer_kernels.testing.inputs import alone, make_inputs, row_of
from interformer_kernels.testing.ops import OPS, call_eager, cases, hard_cases, hard_value_cases, reach

__all__ = [
    "ALL_EMPTY",
    "DIFFERENTIABLE",
    "HARD_VALUES",
    "MIXED",
    "NO_ROWS",
    "NUMBERS",
    "ONE_GIANT",
    "OPS",
    "PLANTED",
    "TILE_EDGES",
    "Case",
    "Errors",
    "Numbers",
    "Plant",
    "Row",
    "Run",
    "Sums",
    "alone",
    "call",
    "call_eager",
    "cases",
    "cast_inputs",
    "check_planted",
    "compare",
    "compare_hard",
    "differences",
    "evaluate",
    "hard_cases",
    "hard_value_cases",
    "held_tokens",
    "judge",
    "make_inputs",
    "measure",
    "offsets_of",
    "plants",
    "pooled",
    "reach",
    "rotary_tables",
    "row_of",
]
