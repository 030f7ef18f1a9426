"""Every op is specialised, compiled for sm_90 and launched by Triton's own path, and no kernel spills.

Everything but the launch itself runs (`tools/fake_triton_driver.py`), for calls as users make them: options left out,
sizes of 1, views at odd offsets. A part of the cases, each in one dtype in rotation; with EVERY=1 every case in every
dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_triton_driver
import pytest
import torch
import triton
import triton.language as tl
from every import EVERY
from grid import ALL_CASES, GPU_DTYPES, case_ids, gpu_dtypes
from resources.triton_kernels import SHARED_MEMORY

import interformer_kernels as ik
from interformer_kernels import testing
from interformer_kernels._triton import _programs
from interformer_kernels.testing import Case, offsets_of

TARGET = "sm_90"
DRIVER = fake_triton_driver.install(TARGET)
# CI runs one case in so many, beside those below. For Tritons newer than 3.6 it has `make resources`, too, and here
# half as many cases, in float32 and in one dtype of 16 bits.
_OLD = tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 6)
_EVERY_NTH = 1 if EVERY else 7 if _OLD else 14


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for the kernels that a test compiles."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return tmp_path


def fits(cache: Path) -> int:
    """Number of kernels that were compiled; none spills, and none outgrows the device's shared memory."""
    compiled = list(fake_triton_driver.compiled_in(cache))
    assert not [kernel for kernel in compiled if kernel.spills or kernel.shared > SHARED_MEMORY[TARGET]]
    assert all(0 < kernel.registers <= 255 for kernel in compiled)
    return len(compiled)


def run(op: str, inputs: dict[str, Any]) -> int:
    """Launches of a call and its backward."""
    before = DRIVER.launches
    testing.evaluate(lambda: testing.call(op, inputs, "triton"), op, inputs)
    return DRIVER.launches - before


# Every kernel at the sizes of models.
OF_MODELS = [
    Case("jagged_attention", "of a model", lengths=(40, 3), heads=2, kv_heads=2, head_size=64, value_size=64,
         gate="full", residual=True, options={"causal": True}),
    Case("pma_pooling", "of a model", lengths=(1100, 3), queries=2),
    Case("gated_cross_attention", "of a model", lengths=(1100, 3), queries=2, gate="full", residual=True),
    Case("jagged_attention", "of a model, rotary", lengths=(40, 3), heads=2, kv_heads=2, head_size=64, value_size=64,
         rope=64),
    Case("apply_rotary", "of a model", rope=16),
    Case("jagged_softmax", "of a model", heads=1),
    Case("jagged_weighted_sum", "of a model", heads=1, head_size=64),
    Case("personalized_ffn", "of a model", head_size=64, value_size=64, residual=True),
]  # fmt: skip
PAIRS = [
    (case, dtype)
    for i, case in enumerate(OF_MODELS)
    for dtype in (GPU_DTYPES if EVERY or _OLD else (GPU_DTYPES[0], GPU_DTYPES[1 + i % 2]))
] + [(case, dtype) for i, case in enumerate(ALL_CASES) if i % _EVERY_NTH == 0 for dtype in gpu_dtypes(i // _EVERY_NTH)]
IDS = [
    f"{name}-{str(dtype)[6:]}" for name, (_, dtype) in zip(case_ids([case for case, _ in PAIRS]), PAIRS, strict=True)
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=IDS)
def test_launches_compile_and_do_not_spill(case: Case, dtype: torch.dtype, cache: Path) -> None:
    """Forward and backward, and the forward alone, which keeps nothing for a backward."""
    inputs = testing.make_inputs(case, dtype)
    launched = run(case.op, inputs)
    with torch.no_grad():
        testing.call(case.op, inputs, "triton")
    assert launched >= 2 or not sum(case.lengths) or not case.queries
    fits(cache)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("lengths", [(64, 50), (40, 3, 2, 1)], ids=["long", "short"])
def test_lists_of_tiles_are_launched(
    lengths: tuple[int, ...], dtype: torch.dtype, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of large batches, which read their tiles from a list, one or several to a program."""
    monkeypatch.setattr(_programs, "MANY_ROWS", 0)
    case = Case("jagged_attention", "", lengths=lengths, heads=2, kv_heads=2, head_size=64, value_size=64)
    # A list, the tiles' kernel and the short rows' in the forward; the list again, dQ, dK and short rows.
    assert run(case.op, testing.make_inputs(case, dtype)) >= 7
    fits(cache)


@pytest.mark.parametrize("batches", [((5, 20), (1,), (9, 0, 60, 16)), ((9, 0, 300, 16), (200,), (5, 1000))])
def test_a_second_call_compiles_nothing(batches: tuple[tuple[int, ...], ...], cache: Path) -> None:
    """Other lengths and numbers of rows are served by the same kernels, with and without splits of long rows: only
    options, heads and channels count."""
    kernels, channels = {}, 24 if sum(batches[0]) < 128 else 40
    for lengths in batches:
        case = Case(
            "pma_pooling", "", lengths=lengths, heads=3, kv_heads=3, head_size=channels, value_size=channels, tail=0
        )
        launched = run(case.op, testing.make_inputs(case, torch.bfloat16))
        assert launched
        kernels[lengths] = fits(cache)
    assert len(set(kernels.values())) == 1, kernels
    assert kernels[batches[0]] > 0


def test_views_that_are_not_aligned_are_compiled_anew(cache: Path) -> None:
    """A tensor that begins at an odd number is another specialisation than one that begins at 16 bytes."""
    offsets, wide = offsets_of((5, 20)), torch.randn(25, 2, 65, dtype=torch.bfloat16)
    counts = []
    for x in (wide[..., :64].contiguous(), wide[..., 1:]):
        ik.jagged_attention(x, x, x, offsets, backend="triton")
        counts.append(fits(cache))
    assert 0 < counts[0] < counts[1]


def test_ones_are_constants_of_the_kernel(cache: Path) -> None:
    """One head, one channel, one row, one token: strides and sizes of 1 are another specialisation, too."""
    case = Case("jagged_attention", "", lengths=(1,), heads=1, kv_heads=1, head_size=1, value_size=1, tail=0)
    assert run(case.op, testing.make_inputs(case, torch.float16)) > 0
    assert fits(cache) > 0


@triton.jit
def _of_many_numbers(x, y, NUMBERS: tl.constexpr):
    o = tl.arange(0, NUMBERS)
    b = tl.load(x + o)
    tl.store(y + o, b - tl.sum(b, 0))


def test_what_spills_is_seen(cache: Path) -> None:
    """512 numbers of a thread that all live until their sum is known do not fit into registers."""
    x = torch.empty(16384)
    _of_many_numbers[(1,)](x, x, NUMBERS=16384, num_warps=1)
    (kernel,) = fake_triton_driver.compiled_in(cache)
    assert kernel.spills > 0
