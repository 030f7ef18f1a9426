"""The cases, inputs, definition and reach of the three ops of the attention family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interformer_kernels import reference
from interformer_kernels._calls import GATE_ACTIVATIONS, GATE_FORMS, SCORES, AttentionCall
from interformer_kernels.testing.case import ALL_EMPTY, HARD_SIZES, MANY_ROWS, NO_ROWS, ONE_GIANT, TILE_EDGES, Case
from interformer_kernels.testing.draw import Draw, Made, offsets_of
from interformer_kernels.testing.hard_values import HARD_VALUES, LARGE_SCORES, pointwise
from interformer_kernels.testing.reach import Reach, at, gathered, rows_of

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
    ]


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
    tokens, batch = rows + case.tail, len(case.lengths)
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
    given["cos"], given["sin"] = given.get("rope") or (None, None)
    positions = given.get("rope_positions")
    given["positions_q"], given["positions_k"] = positions if isinstance(positions, tuple) else (positions, positions)
    return AttentionCall(**{name: given[name] for name in AttentionCall._fields if name in given})


def reach(inputs: Mapping[str, Any], name: str, place: tuple[int, ...]) -> Reach:
    """The numbers that may notice a value at one place of an input."""
    return _Readers(inputs).reach(name, place)


class _Readers:
    """Rows of the queries and keys of a call, and who reads whom."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self.shared = "seeds" in inputs
        self.k: Tensor = inputs["k"]
        self.q: Tensor = inputs["seeds" if self.shared else "q"]
        offsets, q_offsets, kv_offsets = (inputs.get(name) for name in ("offsets", "q_offsets", "kv_offsets"))
        key_offsets = offsets if kv_offsets is None else kv_offsets
        assert key_offsets is not None
        self.k_rows = rows_of(key_offsets, len(self.k), inputs.get("skip_prefix", 0))
        rows = torch.arange(len(key_offsets) - 1, device=self.k.device)[:, None]
        if self.shared:
            self.q_rows = rows.expand(-1, len(self.q))
        elif self.q.dim() == 4:
            self.q_rows = rows.expand(-1, self.q.shape[1])
        else:
            query_offsets = offsets if q_offsets is None else q_offsets
            assert query_offsets is not None
            self.q_rows = rows_of(query_offsets, len(self.q))
        heads = torch.arange(self.q.shape[-2], device=self.k.device)
        self.kv_head: Tensor = heads // (self.q.shape[-2] // self.k.shape[1])

    def reach(self, name: str, place: tuple[int, ...]) -> Reach:
        given = self.inputs
        channels = given["grad_out"].shape[-1]
        queries = self._queries(name, place)  # [..., H]
        outputs = queries[..., None].expand(*queries.shape, channels)
        forward, backward = name not in ("grad_out", "grad_lse"), name != "residual"
        nothing = torch.zeros_like(queries)
        reached = {"out": outputs if forward else torch.zeros_like(outputs)}
        if given.get("score", "softmax") == "softmax":
            of_scores = ("q", "seeds", "k", "sinks", "position_bias", "time_bias")
            reached["lse"] = queries if name in of_scores else nothing
        keys = self._keys(queries) if backward else torch.zeros_like(self._keys(queries))
        of_queries = queries if backward else nothing
        of_queries = of_queries.any(0) if self.shared else of_queries
        reached["dseeds" if self.shared else "dq"] = of_queries[..., None].expand_as(self.q)
        reached["dk"] = keys[..., None].expand_as(self.k)
        of_scores_alone = name == "grad_lse"
        if given.get("v") is not None:
            reached["dv"] = (keys & (not of_scores_alone))[..., None].expand_as(given["v"])
        if given.get("gate") is not None:
            of_gate = backward and not of_scores_alone
            reached["dgate"] = gathered(outputs if of_gate else torch.zeros_like(outputs), given["gate"])
        by_head = queries.flatten(0, -2).any(0) & backward
        for table in ("sinks", "position_bias", "time_bias"):
            if (x := given.get(table)) is not None:
                some = by_head if x.shape[0] == len(by_head) else by_head.any()[None]
                reached[f"d{table}"] = some.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
        if given.get("residual") is not None:
            reached["dresidual"] = outputs if name == "grad_out" else torch.zeros_like(outputs)
        return reached

    def _queries(self, name: str, place: tuple[int, ...]) -> Tensor:
        """Queries under their heads, `[..., H]`, that read the place directly."""
        x: Tensor = self.inputs[name]
        if name in ("k", "v"):
            of_row = (self.q_rows == self.k_rows[place[0]]) & (self.q_rows >= 0)
            return torch.logical_and(of_row[..., None], self.kv_head == place[1])
        if name in ("sinks", "position_bias", "time_bias"):
            heads = torch.arange(self.q.shape[-2], device=x.device)
            of_head = (heads == place[0]) | (x.shape[0] != len(heads))
            return of_head & (self.q_rows >= 0)[..., None]
        mask = at(x, place)
        if name in ("gate", "residual"):
            mask = mask.expand(self.inputs["grad_out"].shape)
        mask = mask if name == "grad_lse" else mask.any(-1)
        mask = mask.expand(*self.q_rows.shape, mask.shape[-1])
        return mask & (self.q_rows >= 0)[..., None]

    def _keys(self, queries: Tensor) -> Tensor:
        """Keys under their heads, `[Tk, Hk]`, of the rows and heads that those queries attend to."""
        places = queries.nonzero()
        rows, heads = self.q_rows[tuple(places[:, :-1].T)], self.kv_head[places[:, -1]]
        reached = torch.zeros(self.k.shape[:2], dtype=torch.bool, device=self.k.device)
        for row, head in {(int(row), int(head)) for row, head in zip(rows, heads, strict=True)}:
            reached[self.k_rows == row, head] = True
        return reached
