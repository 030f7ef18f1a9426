"""The reach of the three ops of the attention family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interformer_kernels.testing.reach import Reach, at, gathered, rows_of


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
        kv_rows = inputs.get("kv_rows")
        if kv_rows is not None:
            rows = self.q_rows if self.q.dim() == 3 else torch.arange(len(self.q), device=self.k.device)[:, None]
            # Row -1, of tokens outside every row, reads the -1 at the end; without any row too.
            self.q_rows = torch.nn.functional.pad(kv_rows.long(), (0, 1), value=-1)[rows].expand(self.q.shape[:-2])
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
