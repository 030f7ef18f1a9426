"""Hypothesis over shapes, lengths and options: any legal call is right, on every backend."""

from __future__ import annotations

from typing import Any

import torch
from grid import backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interformer_kernels import testing
from interformer_kernels._checks import FFN_ACTIVATIONS, GATE_ACTIVATIONS, GATE_FORMS, SCORES
from interformer_kernels.testing import Case

lengths = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40)), max_size=6).map(tuple)


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
        "queries": draw(st.integers(0, 5)),
        "heads": kv_heads * draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "head_size": draw(st.integers(1, 20)),
        "value_size": draw(st.integers(1, 20)),
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
        "head_size": draw(st.integers(2, 20)),
        "value_size": draw(st.integers(1, 20)),
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


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases, dtype=dtypes, seed=st.integers(0, 2**16))
def test_any_legal_call_is_within_the_budget(case: Case, dtype: torch.dtype, seed: int) -> None:
    for backend in backends(case.op, dtype):
        breaches = [row for row in testing.compare(case, backend, dtype, seed=seed) if not row.ok]
        assert not breaches, (backend, breaches)
