"""Inputs and the error budget, shared by the tests, the benches and `interformer-kernels parity`.

A `Case` names one call of one op; `make_inputs` draws its tensors; `compare` runs it on a backend and holds the output,
the log-sum-exp and every gradient against the float64 truth. The budget of a quantity is OPS.md's:

    error <= 2 x (error of the same formula in eager PyTorch at the same dtype) + one rounding unit of its largest value

where errors are the largest absolute difference to the truth. Nothing here is tuned by hand. For float64 there is no
finer truth: eager PyTorch's float32 error, scaled by the ratio of the two rounding units (`2**-29`), stands in for
eager's, and is allowed once more, since the float64 truth itself errs by as much.
"""

from interformer_kernels.testing.budget import (
    DIFFERENTIABLE,
    Errors,
    Row,
    Run,
    call,
    call_eager,
    cast_inputs,
    compare,
    evaluate,
    judge,
    largest_error,
    measure,
)
from interformer_kernels.testing.grid import (
    ALL_EMPTY,
    MIXED,
    NO_ROWS,
    ONE_GIANT,
    OPS,
    TILE_EDGES,
    Case,
    cases,
)
from interformer_kernels.testing.inputs import (
    alone,
    make_inputs,
    offsets_of,
    rotary_tables,
    row_of,
)

__all__ = [
    "ALL_EMPTY",
    "DIFFERENTIABLE",
    "MIXED",
    "NO_ROWS",
    "ONE_GIANT",
    "OPS",
    "TILE_EDGES",
    "Case",
    "Errors",
    "Row",
    "Run",
    "alone",
    "call",
    "call_eager",
    "cases",
    "cast_inputs",
    "compare",
    "evaluate",
    "judge",
    "largest_error",
    "make_inputs",
    "measure",
    "offsets_of",
    "rotary_tables",
    "row_of",
]
