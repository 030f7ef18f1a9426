"""The numbers of a call that may depend on one place of an input: the contract of values that are not finite.

A query's own number reaches that query's output, and in the backward its own gradient and those of the keys and values
of its row under its key/value head. A key or value reaches the queries of its row under the heads that read it. Sums
over rows or tokens (gradients of seeds and of gates that broadcast) are reached by what they sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Reach = dict[str, Tensor]


def reach(op: str, inputs: Mapping[str, Any], name: str, place: tuple[int, ...]) -> Reach:
    """By quantity (`out`, `lse`, `dq`, ...): True where a value at `place` of input `name` may be noticed."""
    if op == "apply_rotary":
        return _rotary(inputs, name, place)
    if op == "personalized_ffn":
        return _ffn(inputs, name, place)
    return _Attention(inputs).reach(name, place)


def _rows_of(offsets: Tensor, tokens: int, skip: int = 0) -> Tensor:
    """Row of each token; -1 on the tail and on the first `skip` of a row."""
    token = torch.arange(tokens, device=offsets.device)
    row = torch.searchsorted(offsets[1:].long().contiguous(), token, right=True)
    held = (token < offsets[-1]) & (token - offsets.long()[row] >= skip)
    return row.where(held, -1)


def _at(x: Tensor, place: tuple[int, ...]) -> Tensor:
    """True at one place of a tensor like `x`."""
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[place] = True
    return mask


def _gathered(mask: Tensor, like: Tensor) -> Tensor:
    """A mask over the output, gathered into the shape of what broadcasts to it."""
    own = (1,) * (mask.dim() - like.dim()) + tuple(like.shape)
    axes = [axis for axis, size in enumerate(own) if size == 1]
    for axis in axes:
        mask = mask.any(axis, keepdim=True)
    return mask.view(like.shape)


class _Attention:
    """A call of the attention family: rows of its queries and keys, and who reads whom."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = inputs
        self.shared = "seeds" in inputs
        self.k: Tensor = inputs["k"]
        self.q: Tensor = inputs["seeds" if self.shared else "q"]
        own, keys = inputs.get("q_offsets"), inputs.get("kv_offsets")
        offsets = inputs.get("offsets")
        key_offsets = offsets if keys is None else keys
        assert key_offsets is not None
        self.k_rows = _rows_of(key_offsets, len(self.k), inputs.get("skip_prefix", 0))
        rows = torch.arange(len(key_offsets) - 1, device=self.k.device)[:, None]
        if self.shared:
            self.q_rows = rows.expand(-1, len(self.q))
        elif self.q.dim() == 4:
            self.q_rows = rows.expand(-1, self.q.shape[1])
        else:
            query_offsets = own if own is not None else offsets
            assert query_offsets is not None
            self.q_rows = _rows_of(query_offsets, len(self.q))
        heads = torch.arange(self.q.shape[-2], device=self.k.device)
        self.kv_head: Tensor = heads // (self.q.shape[-2] // self.k.shape[1])

    def reach(self, name: str, place: tuple[int, ...]) -> Reach:
        given = self.inputs
        channels = given["grad_out"].shape[-1]
        queries = self._queries(name, place)  # [..., H]
        outputs = queries[..., None].expand(*queries.shape, channels)
        forward, backward = name != "grad_out", name != "residual"
        nothing = torch.zeros_like(queries)
        found = {"out": outputs if forward else torch.zeros_like(outputs)}
        if given.get("score", "softmax") == "softmax":
            found["lse"] = queries if name in ("q", "seeds", "k") else nothing
        keys = self._keys(queries) if backward else torch.zeros_like(self._keys(queries))
        of_queries = queries if backward else nothing
        of_queries = of_queries.any(0) if self.shared else of_queries
        found["dseeds" if self.shared else "dq"] = of_queries[..., None].expand_as(self.q)
        found["dk"] = keys[..., None].expand_as(self.k)
        if given.get("v") is not None:
            found["dv"] = keys[..., None].expand_as(given["v"])
        if given.get("gate") is not None:
            found["dgate"] = _gathered(outputs if backward else torch.zeros_like(outputs), given["gate"])
        if given.get("residual") is not None:
            found["dresidual"] = outputs if name == "grad_out" else torch.zeros_like(outputs)
        return found

    def _queries(self, name: str, place: tuple[int, ...]) -> Tensor:
        """Queries under their heads, `[..., H]`, that read the place directly."""
        x: Tensor = self.inputs[name]
        if name in ("k", "v"):
            of_row = (self.q_rows == self.k_rows[place[0]]) & (self.q_rows >= 0)
            return torch.logical_and(of_row[..., None], self.kv_head == place[1])
        mask = _at(x, place)
        if name in ("gate", "residual"):
            mask = mask.expand(self.inputs["grad_out"].shape)
        mask = mask.any(-1)
        mask = mask.expand(*self.q_rows.shape, mask.shape[-1])
        return mask & (self.q_rows >= 0)[..., None]

    def _keys(self, queries: Tensor) -> Tensor:
        """Keys under their heads, `[Tk, Hk]`, of the rows and heads that those queries attend to."""
        places = queries.nonzero()
        rows, heads = self.q_rows[tuple(places[:, :-1].T)], self.kv_head[places[:, -1]]
        found = torch.zeros(self.k.shape[:2], dtype=torch.bool, device=self.k.device)
        for row, head in {(int(row), int(head)) for row, head in zip(rows, heads, strict=True)}:
            found[self.k_rows == row, head] = True
        return found


def _ffn(inputs: Mapping[str, Any], name: str, place: tuple[int, ...]) -> Reach:
    x, weight, grad = inputs["x"], inputs["weight"], inputs["grad_out"]
    rows = _rows_of(inputs["offsets"], len(x))
    of_row = name in ("weight", "bias")
    row = torch.tensor(place[0]) if of_row else rows[place[0]]
    tokens = (rows == row) if of_row else torch.arange(len(x)) == place[0]
    tokens = tokens & (rows >= 0)
    this_row = (torch.arange(len(weight)) == row) & (name != "residual")
    forward, backward = name != "grad_out", name != "residual"
    found = {
        "out": (tokens & forward)[:, None].expand_as(grad),
        "dx": (tokens & backward)[:, None].expand_as(x),
        "dweight": this_row[:, None, None].expand_as(weight),
    }
    if inputs.get("bias") is not None:
        found["dbias"] = this_row[:, None].expand_as(inputs["bias"])
    if inputs.get("residual") is not None:
        found["dresidual"] = (tokens & (name == "grad_out"))[:, None].expand_as(grad)
    return found


def _rotary(inputs: Mapping[str, Any], name: str, place: tuple[int, ...]) -> Reach:
    x = inputs["x"]
    held = _rows_of(inputs["offsets"], len(x))[place[0]] >= 0
    head = (_at(x, place) & held).any(-1, keepdim=True).expand_as(x)
    nothing = torch.zeros_like(head)
    return {"out": head if name == "x" else nothing, "dx": head if name == "grad_out" else nothing}
