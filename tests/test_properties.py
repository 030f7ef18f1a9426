"""Hypothesis over shapes, lengths, options, layouts in memory and offsets: any call is right, on every backend.

`make fuzz` runs the same tests on the CPU kernels, over many more calls (see `conftest.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_calls import MEMORY_LAYOUTS, differing, relaid_inputs, results
from grid import backends
from hypothesis import assume, given
from hypothesis import strategies as st

import interformer_kernels
from interformer_kernels import testing
from interformer_kernels._checks import FFN_ACTIVATIONS, GATE_ACTIVATIONS, GATE_FORMS, SCORES
from interformer_kernels.testing import Case

row_lengths = st.one_of(st.integers(0, 3), st.integers(0, 3), st.integers(0, 40), st.integers(0, 150))
lengths = st.lists(row_lengths, max_size=6).map(tuple)
# Mostly small ones, those of vectors and tiles, and now and then anything.
small = st.integers(1, 20)
channels = st.one_of(small, small, small, st.sampled_from((16, 32, 64, 128)), st.integers(1, 512))

# Draws of a call: what these leave short of 1024 numbers is judged by the grids of the other tests.
MOST_DRAWS = 32


@st.composite
def attention_cases(draw: st.DrawFn, op: str) -> Case:
    """Any call of an op of the attention family."""
    rows = draw(lengths)
    kv_heads = draw(st.integers(1, 3))
    score = draw(st.sampled_from(SCORES))
    options: dict[str, Any] = {
        "score": score,
        "scale": draw(st.sampled_from([None, 0.25, -0.5])),
        "post_scale": 1.0 if score == "softmax" else draw(st.sampled_from([1.0, 0.125])),
        "gate_form": draw(st.sampled_from(GATE_FORMS)),
        "gate_activation": draw(st.sampled_from(GATE_ACTIVATIONS)),
    }
    fields: dict[str, Any] = {
        "lengths": rows,
        "queries": draw(st.one_of(st.integers(0, 5), st.integers(0, 40))),
        "heads": kv_heads * draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "head_size": draw(channels),
        "value_size": draw(channels),
        "tail": draw(st.integers(0, 3)),
        "gate": draw(st.sampled_from(["", "full", "head", "channel", "scalar"])),
        "residual": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "index_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
    }
    own = st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)).map(tuple)
    if op == "pma_pooling":
        options["skip_prefix"] = draw(st.integers(0, 4))
        fields["shared_value"] = draw(st.booleans())
    else:
        fields["query_lengths"] = draw(st.one_of(st.none(), own))
    if op == "jagged_attention":
        options["causal"] = draw(st.booleans())
        options["window"] = draw(st.tuples(st.integers(-1, 6), st.integers(-1, 6)))
        options["num_prefix"] = draw(st.integers(0, 3))
        options["rope_interleaved"] = draw(st.booleans())
        fields["rope"] = 2 * draw(st.integers(0, fields["head_size"] // 2))
        fields["positions"] = fields["query_lengths"] is not None or draw(st.booleans())
    return Case(op, "drawn", **fields, options=options)


@st.composite
def row_cases(draw: st.DrawFn, op: str) -> Case:
    """Any call of the ops without attention."""
    fields: dict[str, Any] = {
        "lengths": draw(lengths),
        "heads": draw(st.integers(1, 3)),
        "head_size": draw(channels.map(lambda n: max(n, 2))),
        "value_size": draw(channels),
        "tail": draw(st.integers(0, 3)),
        "strided": draw(st.booleans()),
        "index_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
    }
    if op == "apply_rotary":
        fields["rope"] = 2 * draw(st.integers(1, fields["head_size"] // 2))
        fields["positions"] = draw(st.booleans())
        options: dict[str, Any] = {"interleaved": draw(st.booleans())}
    else:
        fields["bias"], fields["residual"] = draw(st.booleans()), draw(st.booleans())
        options = {"activation": draw(st.sampled_from(FFN_ACTIVATIONS))}
    return Case(op, "drawn", **fields, options=options)


cases = st.one_of(*(attention_cases(op) for op in testing.OPS[:3]), *(row_cases(op) for op in testing.OPS[3:]))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@pytest.mark.parametrize("backend", backends("jagged_attention"))
@given(case=cases, dtype=dtypes, seed=st.integers(0, 2**16), memory=st.sampled_from(("", *MEMORY_LAYOUTS)))
def test_any_legal_call_is_within_the_budget(
    backend: str, case: Case, dtype: torch.dtype, seed: int, memory: str
) -> None:
    assume(backend in backends(case.op, dtype))

    def make(case: Case, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
        inputs = testing.make_inputs(case, dtype, device, seed)
        return relaid_inputs(inputs, memory) if memory else inputs

    rows = testing.compare(case, backend, dtype, seed=seed, make=make, most_draws=MOST_DRAWS)
    assert not [row for row in rows if not row.ok]
    inputs = make(case, dtype, "cpu", seed)
    with torch.no_grad():
        served = testing.call(case.op, inputs, backend)[0]
    # What is kept for a backward changes no bit of the output.
    assert not differing({"out": served}, {"out": testing.call(case.op, inputs, backend)[0]})


# ---------------------------------------------------------------- offsets of any content


def tokens_of(op: str, name: str, inputs: dict[str, Any]) -> int:
    """How many tokens the offsets of this name cut into rows."""
    of_keys = name == "kv_offsets" or op == "pma_pooling"
    return len(inputs["k"] if of_keys else inputs["q"] if "q" in inputs else inputs["x"])


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
