"""The peers of each op, and the memory that each would take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from interformer_bench import timing, workloads
from interformer_bench.peers import compiled, nested, padded, rotary, rows, scatter, varlen
from interformer_bench.workloads import Inputs, OpFunction, key_offsets
from torch import Tensor, cuda

# Name of this package's own implementation.
OURS = "interformer"
# Bytes that a peer may allocate for one forward call on the CPU; with gradients it is assumed to need twice as much.
MAX_PEER_BYTES = 6 * 2**30
# Groups of peers that have targets of their own: pooling of projected tokens, folded pooling, and the batched product.
PROJECTS, FOLDS, PADDED_BMM = "that projects", "that folds", "padded bmm"


@dataclass(frozen=True)
class Peer:
    """One implementation of an op, or (in `_dense_cores`) of the attention in it.

    Attributes:
        run: the implementation; it takes the op's keyword arguments.
        group: group of peers that targets refer to; empty for most.
        trains: whether it has a backward.
        compiled: whether `torch.compile` makes it, so that its first calls compile.
        empty_rows: whether it should be right where rows are empty.
        tokens: number of padded tensors, as wide as the keys, that it holds at once.
        scores: number of padded score matrices that it holds at once.
        spread: number of tensors with the keys' width for each seed and token that it holds at once.
    """

    run: OpFunction
    group: str = ""
    trains: bool = True
    compiled: bool = False
    empty_rows: bool = True
    tokens: int = 0
    scores: int = 0
    spread: int = 0

    def needs(self, arguments: Inputs) -> int:
        """The approximate number of bytes that a forward call allocates for padding or spreading out."""
        lengths = key_offsets(arguments).diff()
        longest, total = int(lengths.max()), int(lengths.sum())
        queries_or_x: Tensor = next(arguments[name] for name in ("q", "seeds", "x") if name in arguments)
        *_, heads, width = (1, *queries_or_x.shape)
        heads, width = (heads, heads * width) if queries_or_x.dim() > 2 else (1, width)
        queries = longest  # queries of a row: its tokens, unless there are seeds or dense queries
        if "seeds" in arguments:
            queries = queries_or_x.shape[0]
        elif queries_or_x.dim() == 4:
            queries = queries_or_x.shape[1]
        padded_numbers = len(lengths) * longest * (self.tokens * width + self.scores * heads * queries)
        return int(queries_or_x.element_size() * (padded_numbers + self.spread * total * queries * width))


# Attention of queries to packed keys and values: q, k, v, offsets and scale to the output.
AttentionCore = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


# ---------------------------------------------------------------- from a core to the op's arguments


def _scale(q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5)


def as_jagged(core: AttentionCore) -> OpFunction:
    return lambda q, k, v, offsets: core(q, k, v, offsets, _scale(q))


def as_gated(core: AttentionCore) -> OpFunction:
    """Dense queries, with gate and residual where the call has them."""

    def run(
        q: Tensor, k: Tensor, v: Tensor, kv_offsets: Tensor, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        out = core(q, k, v, kv_offsets, _scale(q))
        out = out if gate is None else out * gate.sigmoid()
        return out if residual is None else residual + out

    return run


def as_pooling(core: AttentionCore) -> OpFunction:
    """Dense queries that are equal in every row."""
    return lambda seeds, k, v, offsets: core(seeds.expand(len(offsets) - 1, *seeds.shape), k, v, offsets, _scale(seeds))


def _projecting(pooling: OpFunction) -> OpFunction:
    """Project every token, then pool."""

    def run(seeds: Tensor, x: Tensor, key_weight: Tensor, value_weight: Tensor, offsets: Tensor) -> Tensor:
        k, v = workloads.projected(x, key_weight, value_weight)
        return pooling(seeds=seeds, k=k, v=v, offsets=offsets)

    return run


def _folding(pooling: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> OpFunction:
    """Fold the key weights into the seeds, pool raw tokens `[T, E]`, and apply the value weights."""

    def run(seeds: Tensor, x: Tensor, key_weight: Tensor, value_weight: Tensor, offsets: Tensor) -> Tensor:
        pooled = pooling(workloads.fold(seeds, key_weight), x, offsets, _scale(seeds))
        return workloads.unfold(pooled, value_weight)

    return run


def _with_width(core: Callable[..., Tensor], attention: padded.PaddedAttention, multiple: int = 1) -> AttentionCore:
    """A core over padded tensors that are as wide as the longest row, rounded up to a multiple of `multiple`."""
    return lambda q, k, v, offsets, scale: core(attention, q, k, v, offsets, padded.longest(offsets, multiple), scale)


def _compiled_core(core: Callable[..., Tensor]) -> AttentionCore:
    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
        width = padded.longest(offsets)
        out: Tensor = compiled.compiled(core)(padded.eager_with_mask, q, k, v, offsets, width, scale)
        return out

    return run


def max_peer_bytes(device: str) -> int:
    """Bytes that a peer may allocate for one call: on a GPU, half of the free memory."""
    return timing.free_bytes(device) // 2 if device.startswith("cuda") else MAX_PEER_BYTES


# ---------------------------------------------------------------- peers by op


def _varlen(run: OpFunction) -> dict[str, Peer]:
    """PyTorch's own attention over packed rows, which only GPUs have."""
    return {"varlen_attn": Peer(run)} if cuda.is_available() else {}


def _jagged_peers() -> dict[str, Peer]:
    def with_width(attention: padded.PaddedAttention) -> OpFunction:
        return as_jagged(_with_width(padded.attend_jagged, attention))

    return {
        "padded SDPA": Peer(with_width(padded.sdpa_with_mask), tokens=5),
        "per-row SDPA": Peer(as_jagged(rows.attend_jagged)),
        "nested SDPA": Peer(as_jagged(nested.attend_jagged), tokens=5, scores=1),
        "eager with mask": Peer(with_width(padded.eager_with_mask), tokens=5, scores=3),
        "torch.compile": Peer(as_jagged(_compiled_core(padded.attend_jagged)), compiled=True, tokens=5, scores=2),
        "FlexAttention": Peer(as_jagged(compiled.flex_jagged), compiled=True, trains=False),
        **_varlen(as_jagged(varlen.attend_jagged)),
    }


def _dense_cores() -> dict[str, Peer]:
    """Attention with dense queries, as peers whose `run` is an `AttentionCore`."""

    def with_width(attention: padded.PaddedAttention, multiple: int = 1) -> AttentionCore:
        return _with_width(padded.attend_dense, attention, multiple)

    flex = with_width(compiled.flex_padded, compiled.FLEX_WIDTHS)
    return {
        "padded SDPA": Peer(with_width(padded.sdpa_with_mask), tokens=4),
        "per-row SDPA": Peer(rows.attend_dense),
        "nested SDPA": Peer(nested.attend_dense, tokens=4, scores=1),
        "eager with mask": Peer(with_width(padded.eager_with_mask), tokens=4, scores=3),
        "torch.compile": Peer(_compiled_core(padded.attend_dense), compiled=True, tokens=4, scores=2),
        "FlexAttention": Peer(flex, compiled=True, trains=False, tokens=4),
        **_varlen(varlen.attend_dense),
    }


def _gated_peers() -> dict[str, Peer]:
    return {name: replace(peer, run=as_gated(peer.run)) for name, peer in _dense_cores().items()}


def _pooling_peers() -> dict[str, Peer]:
    def index_add(seeds: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        return scatter.attend(seeds, k, v, offsets, _scale(seeds))

    dense = {name: replace(peer, run=as_pooling(peer.run)) for name, peer in _dense_cores().items()}
    return {**dense, "index-add": Peer(index_add, spread=3)}


def _folded_peers() -> dict[str, Peer]:
    projected = {
        f"projected, {name}": replace(peer, run=_projecting(peer.run), group=PROJECTS)
        for name, peer in _pooling_peers().items()
    }

    def one_head(core: AttentionCore) -> OpFunction:
        """Folded seeds as queries of one head over the raw tokens."""

        def pool(seeds: Tensor, x: Tensor, offsets: Tensor, scale: float) -> Tensor:
            queries = seeds.flatten(0, 1)[:, None].expand(len(offsets) - 1, -1, -1, -1)
            return core(queries, x[:, None], x[:, None], offsets, scale).view(-1, *seeds.shape)

        return _folding(pool)

    chosen = {name: _dense_cores()[name] for name in ("padded SDPA", "eager with mask", "torch.compile")}
    folded = {f"folded, {n}": replace(peer, run=one_head(peer.run), group=FOLDS) for n, peer in chosen.items()}
    return {**projected, **folded, "folded, row by row": Peer(_folding(rows.folded), group=FOLDS)}


def _rotary_peers() -> dict[str, Peer]:
    def compiled_halves(x: Tensor, offsets: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = compiled.compiled(rotary.halves)(x, offsets, rope)
        return out

    return {
        "two halves": Peer(rotary.halves),
        "rotate_half": Peer(rotary.rotate_half),
        "padded": Peer(rotary.padded, tokens=3),
        "row by row": Peer(rotary.by_rows),
        "torch.compile": Peer(compiled_halves, compiled=True),
    }


def _ffn_peers() -> dict[str, Peer]:
    def padded_bmm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
        return padded.ffn(x, weight, offsets, bias, padded.longest(offsets))

    def compiled_bmm(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = compiled.compiled(padded.ffn)(x, weight, offsets, bias, padded.longest(offsets))
        return out

    return {
        "padded bmm": Peer(padded_bmm, group=PADDED_BMM, tokens=2),
        "row by row": Peer(rows.ffn),
        "torch.compile": Peer(compiled_bmm, compiled=True, tokens=2),
    }


@functools.cache
def peers_of(op: str) -> dict[str, Peer]:
    """The peers of an op, by name."""
    peers_by_op = {
        "jagged_attention": _jagged_peers,
        "pma_pooling": _pooling_peers,
        "pma_folded": _folded_peers,
        "gated_cross_attention": _gated_peers,
        "apply_rotary": _rotary_peers,
        "personalized_ffn": _ffn_peers,
    }
    return peers_by_op[op]()


def candidates(op: str, backend: str | None = None, compile_too: bool = True) -> dict[str, Peer]:
    """This package's implementation first, then its peers."""
    peers = {name: peer for name, peer in peers_of(op).items() if compile_too or not peer.compiled}
    return {OURS: Peer(workloads.ours(op, backend)), **peers}
