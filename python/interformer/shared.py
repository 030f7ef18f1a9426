"""InterFormer once per request (docs/interformer.md, section 8): a request's candidates read it, and it reads none.

Axes: `C` candidates, `R` requests, `n_c` and `n_r` tokens of a candidate's and of a request's fields, `T` tokens of all
histories (CLS tokens in front), `N` queries of a candidate, `E` model width, `H` heads of `D = E / H`, `m_r` summary
tokens of a request.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from interformer.batch import Batch
from interformer.config import InterFormerConfig
from interformer.embedding import Embedding
from interformer.interaction import InteractionArch
from interformer.layers import MLP, Gating, SharedTokens, TokenLCE
from interformer.schema import Schema
from interformer_kernels import gated_cross_attention
from interformer_kernels.ops.slices import unbind_slices


class RequestState(NamedTuple):
    """The part of requests that candidates read.

    Attributes:
        keys_values: `[T, 2, H, D]` of each Cross Arch: the keys and values of all tokens.
        summaries: `[R, m_r, E]` of each Cross Arch: `[X_sum | S_sum]`.
        offsets: `[R+1]`: the tokens of each request.
    """

    keys_values: tuple[Tensor, ...]
    summaries: tuple[Tensor, ...]
    offsets: Tensor


class SplitEmbedding(Embedding):
    """The batch's fields as tokens of requests and of candidates, as `Schema.candidate` divides them.

    Raises:
        ValueError: requests or candidates have no field.
    """

    def __init__(self, config: InterFormerConfig, schema: Schema) -> None:
        super().__init__(config, schema)
        names = [field.name for field in schema.categorical]
        self.of_candidate = [i for i, name in enumerate(names) if name in schema.candidate]
        self.of_request = [i for i, name in enumerate(names) if name not in schema.candidate]
        self.dense_of_candidate = [i for i, name in enumerate(schema.dense) if name in schema.candidate_dense]
        self.dense_of_request = [i for i, name in enumerate(schema.dense) if name not in schema.candidate_dense]
        self.dense, self.candidate_dense = (
            nn.Linear(len(columns), config.embed_dim, bias=False) if columns else None
            for columns in (self.dense_of_request, self.dense_of_candidate)
        )
        sides = {"candidate": self.num_candidate_tokens, "request": self.num_request_tokens}
        for side, tokens in sides.items():
            if not tokens:
                wanted = f"Schema.candidate must leave a field to the {side}" if side == "request" else ""
                raise ValueError(f"InterFormer: {wanted or 'Schema.candidate must name a field'}; found {names}")

    @property
    def num_request_tokens(self) -> int:
        """`n_r`."""
        return len(self.of_request) + bool(self.dense_of_request)

    @property
    def num_candidate_tokens(self) -> int:
        """`n_c`."""
        return len(self.of_candidate) + bool(self.dense_of_candidate)

    def request_inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The columns of `dense` and `categorical` that requests read, `[R, ...]`."""
        self._check_batch(batch)
        first = batch.first_impressions()
        return batch.dense[first][:, self.dense_of_request], batch.categorical[first][:, self.of_request]

    def candidate_inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The columns of `dense` and `categorical` that candidates read, `[C, ...]`."""
        self._check_batch(batch)
        return batch.dense[:, self.dense_of_candidate], batch.categorical[:, self.of_candidate]

    def request_tokens(self, dense: Tensor, categorical: Tensor) -> Tensor:
        """Tokens `[R, n_r, E]` of the columns of requests."""
        return self._tokens("request", dense, categorical, (self.dense_of_request, self.of_request), self.dense)

    def candidate_tokens(self, dense: Tensor, categorical: Tensor) -> Tensor:
        """Tokens `[C, n_c, E]` of the columns of candidates."""
        columns = self.dense_of_candidate, self.of_candidate
        return self._tokens("candidate", dense, categorical, columns, self.candidate_dense)

    def _check_batch(self, batch: Batch) -> None:
        names = list(self.schema.dense), [field.name for field in self.schema.categorical]
        _check_columns("batch.", (batch.dense, batch.categorical), names)

    def _tokens(
        self, side: str, dense: Tensor, ids: Tensor, columns: tuple[list[int], list[int]], linear: nn.Linear | None
    ) -> Tensor:
        fields = [self.schema.categorical[column] for column in columns[1]]
        names = [self.schema.dense[column] for column in columns[0]], [field.name for field in fields]
        _check_columns(f"{side}'s ", (dense, ids), names)
        tokens = [self.tables[self.key_of[field.table]](ids[:, i]) for i, field in enumerate(fields)]
        if linear is not None:
            tokens.insert(0, linear(dense.to(linear.weight.dtype)))
        return self.dropout(torch.stack(tokens, 1))


def _check_columns(whose: str, given: tuple[Tensor, Tensor], names: tuple[list[str], list[str]]) -> None:
    for name, x, columns in zip(("dense", "categorical"), given, names, strict=True):
        if x.dim() != 2 or x.shape[1] != len(columns):
            wanted = f"one column for each of {', '.join(columns) or 'none'}"
            raise ValueError(f"InterFormer: {whose}{name} must have {wanted}; found shape {list(x.shape)}")


class KeysAndValues(nn.Module):
    """Keys and values of a Cross Arch's tokens for candidates: `tokens [T, E] -> [T, 2, H, D]`."""

    def __init__(self, config: InterFormerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.linear = nn.Linear(config.embed_dim, 2 * config.embed_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens).unflatten(-1, (2, self.num_heads, -1))


class CandidateCross(nn.Module):
    """A candidate's Cross Arch: its compressed tokens, and what they read of the request's sequence, `[C, 2 N, E]`.

    `Q = Gating(lce(Xc))`, `Z = Gating(W_O attention(W_Q Q, K, V))`, softmax, scale `1/sqrt(D)`, without biases.
    """

    def __init__(self, config: InterFormerConfig, num_tokens: int) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads, self.backend = config.num_heads, config.backend
        self.lce, self.own_gate = TokenLCE(num_tokens, config.num_queries), Gating(config)
        self.query = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = Gating(config)

    def forward(self, x: Tensor, keys_values: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
        own = self.own_gate(self.lce(x))  # [C, N, E]
        q = self.query(own).unflatten(-1, (self.num_heads, -1))
        k, v = unbind_slices(keys_values)
        attn_out = gated_cross_attention(q, k, v, offsets, kv_rows=rows, backend=self.backend)
        assert isinstance(attn_out, Tensor)
        return torch.cat((own, self.gate(self.out(attn_out.flatten(-2)))), 1)


class CandidateSide(nn.Module):
    """Logits `[C]` of candidates, from their tokens and the state of their requests.

    Each layer: Cross Arch, then `Xc' = Interaction([Xc | Z | X_sum | S_sum])`, the last two of the request. The head
    reads `[Q | Z]` of the last Cross Arch and its request's `[X_sum | S_sum]`.
    """

    def __init__(self, config: InterFormerConfig, num_tokens: int) -> None:
        super().__init__()
        self.num_queries = config.num_queries
        depth = config.num_layers - config.literal
        of_request = config.num_cls + config.num_summary
        self.keys_and_values = nn.ModuleList(KeysAndValues(config) for _ in range(depth + 1))
        self.cross = nn.ModuleList(CandidateCross(config, num_tokens) for _ in range(depth + 1))
        self.interaction = nn.ModuleList(
            InteractionArch(config, num_tokens, config.num_queries + of_request) for _ in range(depth)
        )
        widths = ((2 * config.num_queries + of_request) * config.embed_dim, *config.head_hidden, 1)
        self.head = MLP(widths, config.dropout)

    def forward(self, x: Tensor, state: RequestState, rows: Tensor) -> Tensor:
        *inner, last = self.cross
        arches = zip(inner, self.interaction, state.keys_values, state.summaries, strict=False)
        for cross, interaction, keys_values, summary in arches:
            read = cross(x, keys_values, state.offsets, rows)  # [C, 2 N, E]
            own = torch.cat((x, read[:, self.num_queries :]), 1)
            x = interaction.shared(SharedTokens(own, summary, rows))
        read, summary = last(x, state.keys_values[-1], state.offsets, rows), state.summaries[-1]
        first = SharedTokens(read, summary, rows).linear(self.head.first, read.flatten(1), summary.flatten(1))
        return self.head.behind_first(first).squeeze(1)
