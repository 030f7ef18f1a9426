"""Hypothesis strategies of calls: shapes, lengths, options, layouts in memory; and checks of a call on a backend."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import torch
from cpu_calls import MEMORY_LAYOUTS, differing, relaid_inputs
from hypothesis import strategies as st

from interformer_kernels import testing
from interformer_kernels._checks import FFN_ACTIVATIONS, GATE_ACTIVATIONS, GATE_FORMS, SCORES
from interformer_kernels.testing import Case

row_lengths = st.one_of(st.integers(0, 3), st.integers(0, 3), st.integers(0, 40), st.integers(0, 150))
lengths = st.lists(row_lengths, max_size=6).map(tuple)
# Mostly small numbers of channels, those of vectors and tiles, and now and then any.
small = st.integers(1, 20)
channels = st.one_of(small, small, small, st.sampled_from((16, 32, 64, 128)), st.integers(1, 512))

# Scales that bring scores to hundreds, softmaxes that a call with one of them has at least, and its rows at most.
LARGE_SCALES = (20.0, -20.0)
ENOUGH_SOFTMAXES, MOST_ROWS = 4096, 256
# Draws of a call: quantities for which these yield fewer than 1024 numbers are judged by the grids of the other tests.
MOST_DRAWS = 32


@st.composite
def attention_cases(draw: st.DrawFn, op: str) -> Case:
    """Any call of an op of the attention family."""
    rows = draw(lengths)
    kv_heads = draw(st.integers(1, 3))
    score = draw(st.sampled_from(SCORES))
    options: dict[str, Any] = {
        "score": score,
        "scale": draw(st.sampled_from([None, 0.25, -0.5, *(LARGE_SCALES if score == "softmax" else ())])),
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
        "grad_lse": score == "softmax" and draw(st.booleans()),
    }
    query_lengths = st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)).map(tuple)
    if op == "pma_pooling":
        options["skip_prefix"] = draw(st.integers(0, 4))
        fields["shared_value"] = draw(st.booleans())
    else:
        fields["query_lengths"] = draw(st.one_of(st.none(), query_lengths))
    if op == "gated_cross_attention" and rows:
        fields["kv_rows"] = draw(st.one_of(st.none(), st.lists(st.integers(0, len(rows) - 1), max_size=12).map(tuple)))
        if fields["kv_rows"] is not None and fields["query_lengths"] is not None:
            fields["query_lengths"] = (*fields["query_lengths"], *range(12))[: len(fields["kv_rows"])]
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
    elif op != "personalized_ffn":
        options = {}
    else:
        fields["bias"], fields["residual"] = draw(st.booleans()), draw(st.booleans())
        options = {"activation": draw(st.sampled_from(FFN_ACTIVATIONS))}
    return Case(op, "drawn", **fields, options=options)


def _query_tokens(case: Case) -> int:
    """Queries in rows of several keys."""
    queries = case.query_lengths or case.lengths if case.op == "jagged_attention" else case.query_lengths
    keys_of_rows = case.lengths if case.kv_rows is None else [case.lengths[row] for row in case.kv_rows]
    counts = queries or (case.queries,) * len(keys_of_rows)
    return sum(count for count, keys in zip(counts, keys_of_rows, strict=True) if keys > 3)


def _with_enough_softmaxes(case: Case) -> Case:
    """The case, its rows repeated where the scale is large; without that scale where they would be too many.

    There the few queries that have two keys of nearly the largest score carry the whole error of a gradient, eager
    PyTorch's as a backend's. Only over many of them is the ratio of both no matter of luck.
    """
    if case.options.get("scale") not in LARGE_SCALES:
        return case
    times = -(-ENOUGH_SOFTMAXES // max(case.heads * _query_tokens(case), 1))
    if times * len(case.lengths) > MOST_ROWS:
        return dataclasses.replace(case, options={**case.options, "scale": None})
    repeated = {name: getattr(case, name) for name in ("lengths", "query_lengths", "kv_rows")}
    return dataclasses.replace(case, **{name: x and x * times for name, x in repeated.items()})


_drawn = st.one_of(*(attention_cases(op) for op in testing.OPS[:3]), *(row_cases(op) for op in testing.OPS[3:]))
cases = _drawn.map(_with_enough_softmaxes)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**16)
memories = st.sampled_from(("", *MEMORY_LAYOUTS))
# The index of one of a call's plants, modulo their number, which depends on the call.
plant_numbers = st.integers(0, 2**16)


def _small(case: Case) -> Case:
    """The call with heads small enough for the slow backends, of a size that each of them serves, and without a large
    scale, for which they would need too many rows: `hard_calls.LARGE` has it."""
    sizes = {"head_size": min(case.head_size, 128), "value_size": min(case.value_size, 128)}
    sizes["rope"] = min(case.rope, sizes["head_size"] // 2 * 2)
    scale = None if case.options.get("scale") in LARGE_SCALES else case.options.get("scale")
    options = {**case.options, "scale": scale} if "scale" in case.options else case.options
    return dataclasses.replace(case, **sizes, options=options)


small_cases = _drawn.map(_small)
# CI has time for three calls; the profile of `make fuzz`, which draws others each time, has its own number.
on_slow_backends = hypothesis.settings(max_examples=3) if hypothesis.settings().derandomize else hypothesis.settings()


def laid_out_inputs(case: Case, dtype: torch.dtype, seed: int, memory: str) -> dict[str, Any]:
    """The inputs of a call, laid out in memory in one of MEMORY_LAYOUTS, or densely."""
    inputs = testing.make_inputs(case, dtype, seed=seed)
    return relaid_inputs(inputs, memory) if memory else inputs


def check_call(
    backend: str, case: Case, dtype: torch.dtype, seed: int, memory: str, most_draws: int = MOST_DRAWS
) -> None:
    """The call is within the budget; keeping tensors for a backward changes no bit of the output."""
    rows = testing.compare(
        case, backend, dtype, seed=seed, most_draws=most_draws,
        make=lambda case, dtype, device, seed: laid_out_inputs(case, dtype, seed, memory),
    )  # fmt: skip
    assert not [row for row in rows if not row.ok]
    inputs = laid_out_inputs(case, dtype, seed, memory)
    with torch.no_grad():
        served = testing.call(case.op, inputs, backend)[0]
    assert not differing({"out": served}, {"out": testing.call(case.op, inputs, backend)[0]})


def check_plant(backend: str, case: Case, dtype: torch.dtype, seed: int, number: int) -> None:
    """A value that is extreme or not finite, at one place of one input, changes only the results that depend on it."""
    inputs = testing.make_inputs(case, dtype, seed=seed)
    plants = list(testing.plants(inputs))
    if plants:
        assert not testing.check_planted(case, backend, inputs, [plants[number % len(plants)]])
