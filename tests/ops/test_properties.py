"""Any call is right, on every backend; one bad value stays where it belongs; offsets may hold anything.

`make fuzz` runs the same over many more calls, on the CPU kernels, the emulated CUDA and the interpreted Triton ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_calls import differing, results
from grid import backends
from hypothesis import assume, given
from hypothesis import strategies as st
from random_calls import cases, check_call, check_plant, dtypes, memories, plant_numbers, seeds

import interformer_kernels
from interformer_kernels import testing
from interformer_kernels.testing import Case

each_backend = pytest.mark.parametrize("backend", backends("jagged_attention"))


@each_backend
@given(case=cases, dtype=dtypes, seed=seeds, memory=memories)
def test_any_legal_call_is_within_the_budget(
    backend: str, case: Case, dtype: torch.dtype, seed: int, memory: str
) -> None:
    assume(backend in backends(case.op, dtype))
    check_call(backend, case, dtype, seed, memory)


@each_backend
@given(case=cases, dtype=dtypes, seed=seeds, number=plant_numbers)
def test_a_bad_value_stays_where_it_belongs(
    backend: str, case: Case, dtype: torch.dtype, seed: int, number: int
) -> None:
    assume(backend in backends(case.op, dtype))
    check_plant(backend, case, dtype, seed, number)


# ---------------------------------------------------------------- offsets of any content


def tokens_of(op: str, name: str, inputs: dict[str, Any]) -> int:
    """How many tokens the offsets of this name cut into rows."""
    of_keys = name == "kv_offsets" or op == "pma_pooling"
    names = ("k",) if of_keys else ("q", "x", "scores", "v")
    return len(next(inputs[name] for name in names if name in inputs))


@pytest.mark.skipif("cpu" not in backends("jagged_attention"), reason="needs the native module")
@given(case=cases, dtype=dtypes, data=st.data())
def test_cpu_clamps_offsets_of_any_content(case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    """With validation off: all is written, nothing is read outside; rows that do not overlap are the clamped ones."""
    interformer_kernels.set_validation("off")
    inputs = testing.make_inputs(Case(**{**vars(case), "tail": 0}), dtype)
    clamped = dict(inputs)
    for name in ("offsets", "kv_offsets", "q_offsets"):
        if inputs.get(name) is not None:
            total, size = tokens_of(case.op, name, inputs), len(inputs[name])
            limits = torch.iinfo(case.index_dtype)
            near, any_int = st.integers(-3, total + 3), st.integers(limits.min, limits.max)
            drawn = data.draw(st.lists(st.one_of(near, near, any_int), min_size=size, max_size=size), name)
            inputs[name] = torch.tensor(drawn, dtype=case.index_dtype)
            clamped[name] = inputs[name].clamp(0, total)
    found = results(case.op, inputs)
    assert not differing(found, results(case.op, clamped))
    if dtype != torch.float16:  # in which sums overflow
        assert not [name for name, x in found.items() if x.isnan().any()]
