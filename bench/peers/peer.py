"""One implementation of an op, and the memory that it would take."""

from __future__ import annotations

from dataclasses import dataclass

from interformer_bench.ops.call import Inputs, OpFunction, key_offsets
from torch import Tensor

# Name of this package's own implementation.
OURS = "interformer"
# Groups of peers that have targets of their own: pooling of projected tokens, folded pooling, and the batched product.
PROJECTS, FOLDS, PADDED_BMM = "that projects", "that folds", "padded bmm"


@dataclass(frozen=True)
class Peer:
    """One implementation of an op, or (in `cores.py`) of the attention in it.

    Attributes:
        run: the implementation; it takes the op's keyword arguments.
        group: group of peers that targets refer to; empty for most.
        trains: whether it has a backward.
        compiled: whether `torch.compile` makes it, so that its first calls compile.
        empty_rows: whether it should be right where rows are empty.
        within: the largest multiple of its own length that it pads a row to; 0 where it pads to the longest row.
        tokens: number of padded tensors, as wide as the keys, that it holds at once.
        scores: number of padded score matrices that it holds at once.
        spread: number of tensors with the keys' width for each seed and token that it holds at once.
    """

    run: OpFunction
    group: str = ""
    trains: bool = True
    compiled: bool = False
    empty_rows: bool = True
    within: float = 0.0
    tokens: int = 0
    scores: int = 0
    spread: int = 0

    def needs(self, arguments: Inputs) -> int:
        """The approximate number of bytes that a forward call allocates for padding or spreading out."""
        lengths = key_offsets(arguments).diff()
        longest, total = int(lengths.max()), int(lengths.sum())
        queries_or_x: Tensor = next(arguments[name] for name in ("q", "seeds", "x", "v", "scores") if name in arguments)
        *_, heads, width = (1, *queries_or_x.shape)
        heads, width = (heads, heads * width) if queries_or_x.dim() > 2 else (1, width)
        padded = (lengths * self.within).clamp(max=longest) if self.within else lengths.new_full((), longest)
        padded = padded.expand(len(lengths)).double()
        queries = padded  # queries of a row: its tokens, unless there are seeds or dense queries
        if "seeds" in arguments:
            queries = padded.new_tensor(queries_or_x.shape[0])
        elif queries_or_x.dim() == 4:
            queries = padded.new_tensor(queries_or_x.shape[1])
        padded_numbers = float((padded * (self.tokens * width + self.scores * heads * queries)).sum())
        spread_numbers = self.spread * total * float(queries.max()) * width
        return int(queries_or_x.element_size() * (padded_numbers + spread_numbers))

    def padded_length(self, length: int, longest: int) -> float:
        """The number of places that a row takes, in a batch whose longest row has so many."""
        if not self.tokens:
            return length
        return min(longest, self.within * length) if self.within else longest
