"""The cases, inputs and definition of the three ops of the attention family; their reach comes with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import reference
from interformer_kernels._calls import GATE_ACTIVATIONS, GATE_FORMS, SCORES, AttentionCall
from interformer_kernels.testing._attention_reach import reach as reach
from interformer_kernels.testing.case import ALL_EMPTY, HARD_SIZES, MANY_ROWS, NO_ROWS, ONE_GIANT, TILE_EDGES, Case
from interformer_kernels.testing.draw import Draw, Made, offsets_of
from interformer_kernels.testing.hard_values import HARD_VALUES, LARGE_SCORES, pointwise

_SCORES: tuple[dict[str, Any], ...] = tuple(
    {"score": score, "post_scale": 0.125, "scale": 0.3} for score in SCORES if score != "softmax"
)
_GATES = tuple((form, act) for form in GATE_FORMS for act in GATE_ACTIVATIONS)
_GATE_SHAPES = ("full", "head", "channel", "scalar", "full", "token", "heads", "channel")


def cases(op: str) -> list[Case]:
    """The op's share of the grid."""
    return _family_cases(op) + {
        "jagged_attention": _jagged_cases,
        "pma_pooling": _pooling_cases,
        "gated_cross_attention": _cross_cases,
    }[op](op)


def _family_cases(op: str) -> list[Case]:
    """The cases of every op of the attention family."""
    cases = [
        Case(op, "plain"),
        Case(op, "tile edges", lengths=TILE_EDGES, index_dtype=torch.int32),
        Case(op, "one giant row", lengths=ONE_GIANT),
        Case(op, "all rows empty", lengths=ALL_EMPTY),
        Case(op, "no rows", lengths=NO_ROWS),
        Case(op, "no tokens", lengths=ALL_EMPTY, tail=0),
        Case(op, "grouped heads, strided", kv_heads=2, strided=True),
        Case(op, "D != Dv, odd sizes", head_size=7, value_size=10),
        Case(op, "one channel", head_size=1, value_size=1),
        Case(op, "gate and residual", gate="full", residual=True),
        Case(op, "residual", residual=True),
        Case(op, "gradient of lse", grad_lse=True),
        Case(op, "gradient of lse, single keys", lengths=(1, 0, 1, 2, 1), grad_lse=True),
        Case(op, "gradient of lse, giant row", lengths=ONE_GIANT, grad_lse=True, gate="full", strided=True, kv_heads=2),
    ]
    cases += [Case(op, f"score {o['score']}", options=o) for o in _SCORES]
    cases += _option_cases(op)
    for (form, activation), shape in zip(_GATES, _GATE_SHAPES, strict=True):
        gate: dict[str, Any] = {"gate": shape, "residual": form == "self"}
        # A gradient of one number is drawn a thousand times, and one of 16 still 64 times.
        small = {"lengths": (5, 0, 3), "head_size": 4, "value_size": 4}
        sizes: dict[str, Any] = {"scalar": small, "heads": {"heads": 16, **small}}.get(shape, {})
        options = {"gate_form": form, "gate_activation": activation}
        cases.append(Case(op, f"gate {form} {activation} {shape}", **gate, **sizes, options=options))
    return cases


# A gradient of one number for each head is drawn until there are a thousand.
_SMALL: dict[str, Any] = {"lengths": (5, 0, 3, 1), "heads": 16, "kv_heads": 16, "head_size": 4, "value_size": 4}
_DROPPED: dict[str, Any] = {"dropout_p": 0.3, "dropout_seed": -0x123456789ABCDEF}


def _option_cases(op: str) -> list[Case]:
    """Options of scores and weights that every op of the family has."""
    return [
        Case(op, "softcap", lengths=TILE_EDGES, kv_heads=2, options={"softcap": 1.5, "scale": 0.7}),
        Case(op, "softcap, negative scale", options={"softcap": 2.0, "scale": -0.5}, gate="full"),
        Case(op, "softcap, score silu", options={**_SCORES[2], "softcap": 1.0}),
        Case(op, "sinks", **_SMALL, sinks=True, grad_lse=True),
        Case(op, "sinks, softcap, giant row", sinks=True, heads=8, lengths=ONE_GIANT, options={"softcap": 3.0}),
        Case(op, "dropout", lengths=TILE_EDGES, kv_heads=2, options=_DROPPED),
        Case(
            op, "dropout, gate, lse", gate="full", residual=True, grad_lse=True, options={**_DROPPED, "dropout_p": 0.75}
        ),
        Case(
            op, "dropout, giant row", lengths=ONE_GIANT, index_dtype=torch.int32, options={**_DROPPED, "dropout_p": 0.1}
        ),
        Case(op, "dropout, score gelu", options={**_SCORES[3], **_DROPPED}),
        Case(op, "dropout of all", options={"dropout_p": 1.0}),
    ]


def _bias_cases(op: str) -> list[Case]:
    """Biases of jagged and of cross attention."""
    more: dict[str, Any] = {"queries": 9} if op == "gated_cross_attention" else {}
    return [
        Case(op, "position bias", lengths=TILE_EDGES, position_bias=40, **more),
        Case(op, "position bias for all heads", position_bias=-130, kv_heads=2, lengths=ONE_GIANT, grad_lse=True),
        Case(op, "time bias", lengths=TILE_EDGES, time_bias=70, kv_heads=2, **more),
        Case(op, "both biases", position_bias=33, time_bias=64, gate="full", lengths=(9, 0, 40, 1), **more),
        Case(op, "both biases, score silu", position_bias=33, time_bias=64, options=_SCORES[2], **more),
        Case(
            op, "all options", position_bias=33, time_bias=64, sinks=True, heads=16, kv_heads=8, grad_lse=True,
            options={"softcap": 2.0, **_DROPPED}, **more,
        ),
    ]  # fmt: skip


def _pooling_cases(op: str) -> list[Case]:
    return [
        Case(op, "v is k", shared_value=True, kv_heads=1),
        Case(op, "v is k, identity score", shared_value=True, options=_SCORES[0]),
        Case(op, "skip prefix", options={"skip_prefix": 2}),
        Case(op, "gradient of lse, v is k, skip prefix", shared_value=True, grad_lse=True, options={"skip_prefix": 2}),
        Case(op, "one seed", queries=1),
        Case(op, "many seeds", queries=33),
        Case(op, "dropout, v is k, skip prefix", shared_value=True, options={**_DROPPED, "skip_prefix": 3}),
    ]


def _cross_cases(op: str) -> list[Case]:
    return [
        Case(op, "jagged queries", query_lengths=(2, 3, 0, 9, 1), gate="full", residual=True),
        Case(op, "one query", queries=1, gate="head"),
        Case(op, "gradient of lse, jagged queries", query_lengths=(2, 3, 0, 9, 1), grad_lse=True),
        Case(op, "no queries", queries=0),
        Case(op, "both biases, jagged queries", query_lengths=(2, 3, 0, 50, 1), position_bias=33, time_bias=64),
        *_bias_cases(op),
        *_shared_key_cases(op),
    ]


def _shared_key_cases(op: str) -> list[Case]:
    """Rows of queries that share rows of keys, in order or not."""
    some = (2, 0, 2, 1, 4, 2, 2, 3, 0, 4)
    jagged: dict[str, Any] = {"kv_rows": some, "query_lengths": (2, 3, 0, 9, 1, 4, 1, 2, 3, 0)}
    return [
        Case(op, "shared keys", kv_rows=some),
        Case(op, "shared keys in order, one query", kv_rows=(0, 0, 0, 2, 2, 4), queries=1, gate="full", residual=True),
        Case(op, "shared keys, many queries", lengths=TILE_EDGES, kv_rows=7 * some, queries=5, kv_heads=2, gate="head"),
        Case(op, "shared keys, jagged queries", **jagged, gate="full", residual=True, grad_lse=True, strided=True),
        Case(op, "shared keys, int32, one giant row", kv_rows=5 * (2,), lengths=ONE_GIANT, index_dtype=torch.int32),
        Case(op, "shared keys, no rows", kv_rows=(), gate="full"),
        Case(
            op, "shared keys, both biases, sinks", kv_rows=some, position_bias=33, time_bias=64, heads=16, kv_heads=8,
            sinks=True, grad_lse=True, options={"softcap": 2.0},
        ),
        Case(op, "shared keys, score silu", **jagged, options=_SCORES[2]),
    ]  # fmt: skip


def _jagged_cases(op: str) -> list[Case]:
    masks: list[dict[str, Any]] = [
        {"causal": True},
        {"window": (3, 2)},
        {"window": (4, -1), "causal": True},
        {"window": (2, 0), "num_prefix": 2},
        {"causal": True, "num_prefix": 3, "score": "silu", "post_scale": 0.5},
    ]
    grid = [Case(op, f"mask {', '.join(map(str, m))}", options=m) for m in masks]
    grid += [Case(op, f"cross {', '.join(map(str, m))}", query_lengths=(2, 3, 40, 0, 9), options=m) for m in masks]
    grid += [Case(op, f"rotary interleaved={i}", rope=16, options={"rope_interleaved": i}) for i in (False, True)]
    grid += [
        Case(op, "rotary on some channels, positions", rope=10, positions=True, kv_heads=2),
        Case(op, "rotary, cross, positions", rope=16, positions=True, query_lengths=(2, 3, 40, 0, 9)),
        Case(op, "rotary, window, gate", rope=16, gate="head", residual=True, options={"window": (3, 3)}),
        Case(op, "gradient of lse, rotary, causal", rope=16, grad_lse=True, options={"causal": True}),
        Case(op, "gradient of lse, cross, causal", query_lengths=(9, 3, 40, 0, 9), grad_lse=True, options=masks[0]),
    ]
    return grid + _target_cases(op) + _bias_cases(op)


def _target_cases(op: str) -> list[Case]:
    """Masks with targets, tails and the other kinds of prefix."""
    masks: list[dict[str, Any]] = [
        {},
        {"causal": True},
        {"causal": True, "window": (3, 0), "full_tail": 2},
        {"causal": True, "window": (4, -1), "num_prefix": 2, "prefix": "keys"},
        {"causal": True, "window": (2, 0), "num_prefix": 3, "prefix": "index"},
        {"window": (2, 3), "num_prefix": 2, "prefix": "index", "full_tail": 3},
        {"window": (5, 1), "num_prefix": 2, "score": "silu", "post_scale": 0.5},
    ]
    names = [", ".join(map(str, mask.items())) for mask in masks]
    some, edges = (2, 0, 7, 1, 8), (3, 0, 20, 64, 0)
    grid = [Case(op, f"targets {name}", targets=some, options=mask) for name, mask in zip(names, masks, strict=True)]
    grid += [
        Case(op, f"tiles {name}", lengths=TILE_EDGES, options=mask)
        for name, mask in zip(names[2:], masks[2:], strict=True)
    ]
    crossed: dict[str, Any] = {
        "query_lengths": (2, 3, 40, 0, 9),
        "lengths": (5, 0, 37, 1, 8),
        "targets": (1, 0, 20, 0, 3),
    }
    grid += [
        Case(op, f"targets, cross {name}", **crossed, options=mask) for name, mask in zip(names, masks, strict=True)
    ]
    grid += [
        Case(op, "targets, tiles", lengths=TILE_EDGES, targets=edges, options=masks[2], index_dtype=torch.int32),
        Case(op, "targets, giant row", lengths=ONE_GIANT, targets=(1, 0, 100, 0, 1), options=masks[4]),
        Case(op, "targets, rotary, gate", targets=some, rope=16, gate="full", residual=True, options=masks[2]),
        Case(op, "targets, position bias", targets=some, position_bias=33, options=masks[1]),
        Case(op, "index prefix, both biases", position_bias=33, time_bias=64, lengths=TILE_EDGES, options=masks[4]),
        Case(op, "dropout, causal, cross", query_lengths=(9, 3, 40, 0, 9), options={"causal": True, **_DROPPED}),
        Case(op, "sinks, window", sinks=True, heads=16, query_lengths=(9, 3, 40, 0, 9), options={"window": (2, 0)}),
    ]
    return grid


_TABLES: dict[str, Any] = {"position_bias": 5, "time_bias": 6}


def hard_cases(op: str) -> list[Case]:
    """The calls into which values are planted."""
    full: dict[str, Any] = {**HARD_SIZES, "gate": "full", "residual": True}
    grid = [
        Case(op, "gate and residual", **full, grad_lse=True),
        Case(op, "head gate, silu", **HARD_SIZES, gate="head", options=pointwise("silu")),
        Case(op, "softcap, sinks", **HARD_SIZES, sinks=True, grad_lse=True, options={"softcap": 2.0}),
        Case(op, "dropout", **HARD_SIZES, options={"dropout_p": 0.4, "dropout_seed": 5}),
    ]
    if op == "jagged_attention":
        grid += [Case(op, "causal, window, prefix", **HARD_SIZES, options={"window": (4, 0), "num_prefix": 1})]
        grid += [Case(op, "cross", **HARD_SIZES, query_lengths=(2, 3, 0, 20, 9), options={"causal": True})]
        targets: dict[str, Any] = {"targets": (1, 0, 4, 1, 30), "options": {"causal": True, "window": (4, 0)}}
        grid += [Case(op, "targets", **HARD_SIZES, **targets), Case(op, "biases", **HARD_SIZES, **_TABLES)]
    elif op == "pma_pooling":
        grid += [Case(op, "v is k, skip prefix", **HARD_SIZES, shared_value=True, options={"skip_prefix": 2})]
    else:
        grid += [Case(op, "jagged queries", **HARD_SIZES, query_lengths=(2, 3, 0, 9, 1))]
        grid += [Case(op, "biases", **HARD_SIZES, **_TABLES)]
        grid += [Case(op, "shared keys", **HARD_SIZES, kv_rows=(4, 2, 2, 0, 4, 1, 3, 2), gate="full")]
    return grid


def hard_value_cases(op: str, sizes: dict[str, Any]) -> list[Case]:
    """The calls that are made of hard numbers; their names are those of HARD_VALUES."""
    many_rows = {**sizes, "lengths": MANY_ROWS, "shared_value": op == "pma_pooling"}
    return [
        Case(
            op, name, **(many_rows if name == LARGE_SCORES else sizes),
            gate="head" if "gates" in name else "", options=options,
        )
        for name, (_, kinds) in HARD_VALUES.items()
        for options in kinds
    ]  # fmt: skip


def make_inputs(draw: Draw, case: Case, offsets: Tensor) -> Made:
    """The op's arguments."""
    rows = sum(case.lengths)
    tokens, batch = rows + case.tail, len(case.lengths if case.kv_rows is None else case.kv_rows)
    value_size = case.head_size if case.shared_value else case.value_size
    inputs: dict[str, Any] = {
        "k": draw.leaf(tokens, case.kv_heads, case.head_size, rows=rows),
        "v": None if case.shared_value else draw.leaf(tokens, case.kv_heads, case.value_size, rows=rows),
    }
    shape: tuple[int, ...] = (batch, case.queries, case.heads, value_size)
    q_rows = None
    if case.op == "pma_pooling":
        inputs.update(seeds=draw.leaf(case.queries, case.heads, case.head_size), offsets=offsets)
    elif case.op == "gated_cross_attention" and case.query_lengths is None:
        inputs.update(q=draw.leaf(*shape[:3], case.head_size), kv_offsets=offsets)
    else:
        q_rows = rows if case.query_lengths is None else sum(case.query_lengths)
        inputs.update(_jagged_queries(draw, case, offsets, q_rows))
        shape = (q_rows + case.tail, case.heads, value_size)
    if case.kv_rows is not None:
        inputs["kv_rows"] = torch.tensor(case.kv_rows, dtype=case.index_dtype, device=draw.device)
    inputs.update(_tables(draw, case, inputs))
    return {**inputs, **draw.epilogue(shape, q_rows)}, shape, q_rows


def _tables(draw: Draw, case: Case, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Sinks, biases with their times, and targets."""
    tables: dict[str, Any] = {}
    if case.sinks:
        tables["sinks"] = draw.table(case.heads)
    if case.position_bias:
        heads = case.heads if case.position_bias > 0 else 1
        tables["position_bias"] = draw.table(heads, 2 * abs(case.position_bias) + 1)
    if case.time_bias:
        edges = draw.whole(0, 3 * case.time_bias, case.time_bias - 1).sort().values
        tables.update(time_bias=draw.table(case.heads, case.time_bias), time_edges=edges)
        times_k = draw.whole(-2 * case.time_bias, 2 * case.time_bias, len(inputs["k"]))
        q = inputs["q"]
        if case.op == "jagged_attention" and case.query_lengths is None:
            tables["times"] = times_k
        else:
            rows = q.shape[:-2]
            tables["times"] = draw.whole(-2 * case.time_bias, 2 * case.time_bias, math.prod(rows)).view(rows), times_k
    if case.targets is not None:
        tables["num_targets"] = torch.tensor(case.targets, dtype=case.index_dtype, device=draw.device)
    return tables


def _jagged_queries(draw: Draw, case: Case, offsets: Tensor, rows: int) -> dict[str, Any]:
    """Queries, offsets and rotary arguments of a call whose queries are jagged."""
    queries: dict[str, Any] = {"q": draw.leaf(rows + case.tail, case.heads, case.head_size, rows=rows)}
    q_offsets = None if case.query_lengths is None else offsets_of(case.query_lengths, case.index_dtype, draw.device)
    if case.op == "gated_cross_attention":
        return {**queries, "kv_offsets": offsets, "q_offsets": q_offsets}
    queries["offsets"] = offsets if q_offsets is None else q_offsets
    if q_offsets is not None:
        queries["kv_offsets"] = offsets
    if case.rope:
        queries["rope"] = draw.tables()
        if case.positions:
            pair = draw.positions(rows + case.tail), draw.positions(sum(case.lengths) + case.tail)
            queries["rope_positions"] = pair[0] if q_offsets is None else pair
    return queries


def call_eager(op: str, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The definition."""
    call = _call(op, inputs)
    out, lse, _ = reference.attention(call, inputs.get("residual"))
    return out, lse if call.score == "softmax" else None


def _with_own_keys(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keys, values and their times, copied for each row of queries."""
    starts, ends = given["kv_offsets"][:-1].tolist(), given["kv_offsets"][1:].tolist()
    tokens = [torch.arange(starts[row], ends[row]) for row in given["kv_rows"].tolist()]
    index = torch.cat([torch.arange(0), *tokens]).to(given["k"].device)
    offsets = offsets_of([len(row) for row in tokens], given["kv_offsets"].dtype, given["k"].device)
    own = {name: given[name][index] for name in ("k", "v", "times_k") if given.get(name) is not None}
    return {**own, "kv_offsets": offsets}


def _call(op: str, inputs: Mapping[str, Any]) -> AttentionCall:
    given: dict[str, Any] = {"layout": "packed", "v": None, "q_offsets": None, "kv_offsets": None, **inputs}
    if op == "pma_pooling":
        given.update(layout="shared", q=given["seeds"], kv_offsets=given["offsets"])
    elif op == "gated_cross_attention":
        given["layout"] = "dense" if given["q_offsets"] is None else "packed"
    elif given["kv_offsets"] is None:
        given["kv_offsets"] = given["offsets"]
    else:
        given["q_offsets"] = given["offsets"]
    if given.get("scale") is None:
        given["scale"] = given["k"].shape[-1] ** -0.5
    given["window_left"], given["window_right"] = given.get("window", (-1, -1))
    times = given.get("times")
    given["times_q"], given["times_k"] = times if isinstance(times, tuple) else (times, times)
    given["queries_at_end"] = op == "gated_cross_attention"
    if isinstance(seed := given.get("dropout_seed"), int):
        given["dropout_seed"] = torch.tensor(seed, device=given["k"].device)
    if given.get("kv_rows") is not None:
        given.update(_with_own_keys(given))
    given["cos"], given["sin"] = given.get("rope") or (None, None)
    positions = given.get("rope_positions")
    given["positions_q"], given["positions_k"] = positions if isinstance(positions, tuple) else (positions, positions)
    return AttentionCall(**{name: given[name] for name in AttentionCall._fields if name in given})
